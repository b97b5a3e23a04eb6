//! TLS for clients and peers, from etcd's flags, as far as it is gRPC's.

use std::path::Path;

use anyhow::Context as _;
pub use keelson_tls::{ServerTls, Stamp, TlsFiles};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// What is spoken over TLS.
pub const PROTOCOLS: &[&[u8]] = &[b"h2", b"http/1.1"];

/// What a connection to an `https` URL of the same side needs, as the files are now.
pub fn client(files: &TlsFiles) -> anyhow::Result<Option<ClientTlsConfig>> {
    if files.certificate.is_none() && files.trusted_ca.is_none() {
        return Ok(None);
    }
    let mut config = ClientTlsConfig::new();
    config = match &files.trusted_ca {
        Some(ca) => config.ca_certificate(Certificate::from_pem(read(ca)?)),
        None => config.with_native_roots(),
    };
    if let Some((certificate, key)) = files.pair()? {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(Some(config))
}

/// The common name of a client's certificate, which is its user.
pub fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

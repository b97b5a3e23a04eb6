//! TLS for clients and peers, from etcd's flags.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// Files of one side, clients or peers.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// The server's certificate chain.
    pub certificate: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Whether clients have to show a certificate.
    pub client_auth: bool,
    /// Who signs what the other side shows.
    pub trusted_ca: Option<PathBuf>,
}

impl TlsFiles {
    /// What a listener needs for `https` URLs; `None` if there is no certificate.
    pub fn server(&self) -> anyhow::Result<Option<ServerTlsConfig>> {
        let Some(identity) = self.identity()? else {
            anyhow::ensure!(
                !self.client_auth,
                "clients' certificates can only be asked for with a certificate and a key of the server's own"
            );
            return Ok(None);
        };
        let mut config = ServerTlsConfig::new().identity(identity);
        if self.client_auth {
            let ca = self.trusted_ca.as_deref().context(
                "to check clients' certificates, say who signs them: a trusted CA file is missing",
            )?;
            config = config.client_ca_root(Certificate::from_pem(read(ca)?));
        }
        Ok(Some(config))
    }

    /// What a connection to an `https` URL of the same side needs.
    pub fn client(&self) -> anyhow::Result<Option<ClientTlsConfig>> {
        if self.certificate.is_none() && self.trusted_ca.is_none() {
            return Ok(None);
        }
        let mut config = ClientTlsConfig::new();
        config = match &self.trusted_ca {
            Some(ca) => config.ca_certificate(Certificate::from_pem(read(ca)?)),
            None => config.with_native_roots(),
        };
        if let Some(identity) = self.identity()? {
            config = config.identity(identity);
        }
        Ok(Some(config))
    }

    fn identity(&self) -> anyhow::Result<Option<Identity>> {
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => {
                Ok(Some(Identity::from_pem(read(certificate)?, read(key)?)))
            }
            (None, None) => Ok(None),
            _ => anyhow::bail!("a certificate and its key are only of use together"),
        }
    }
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

//! TLS for clients and peers, from etcd's flags. Files that change are read again: the next connection
//! has what they say then.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

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

/// When files were changed last, and their lengths.
pub type Stamp = Vec<Option<(SystemTime, u64)>>;

/// What a listener needs for `https` URLs.
#[derive(Debug, Clone)]
pub struct ServerTls {
    files: TlsFiles,
    current: Arc<Mutex<(Stamp, Arc<ServerConfig>)>>,
}

impl ServerTls {
    /// For the next connection. Files that make no sense are as if they had not changed.
    pub fn config(&self) -> Arc<ServerConfig> {
        let stamp = self.files.stamp();
        let mut current = self.current.lock();
        if current.0 != stamp {
            match self.files.server_config() {
                Ok(config) => {
                    tracing::info!("certificates have changed: new connections have the new ones");
                    current.1 = Arc::new(config);
                }
                // They may be in the middle of being written: it is said once.
                Err(error) => tracing::warn!("changed certificates are not used: {error:#}"),
            }
            current.0 = stamp;
        }
        Arc::clone(&current.1)
    }
}

impl TlsFiles {
    /// What a listener needs for `https` URLs; `None` if there is no certificate.
    pub fn server(&self) -> anyhow::Result<Option<ServerTls>> {
        if self.certificate.is_none() && self.key.is_none() {
            anyhow::ensure!(
                !self.client_auth,
                "clients' certificates can only be asked for with a certificate and a key of the server's own"
            );
            return Ok(None);
        }
        let current = (self.stamp(), Arc::new(self.server_config()?));
        Ok(Some(ServerTls {
            files: self.clone(),
            current: Arc::new(Mutex::new(current)),
        }))
    }

    /// What a connection to an `https` URL of the same side needs, as the files are now.
    pub fn client(&self) -> anyhow::Result<Option<ClientTlsConfig>> {
        if self.certificate.is_none() && self.trusted_ca.is_none() {
            return Ok(None);
        }
        let mut config = ClientTlsConfig::new();
        config = match &self.trusted_ca {
            Some(ca) => config.ca_certificate(Certificate::from_pem(read(ca)?)),
            None => config.with_native_roots(),
        };
        if let Some((certificate, key)) = self.pair()? {
            config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(Some(config))
    }

    /// Changes when a file does.
    pub fn stamp(&self) -> Stamp {
        [&self.certificate, &self.key, &self.trusted_ca]
            .into_iter()
            .map(|path| {
                let metadata = std::fs::metadata(path.as_ref()?).ok()?;
                Some((metadata.modified().ok()?, metadata.len()))
            })
            .collect()
    }

    fn pair(&self) -> anyhow::Result<Option<(&Path, &Path)>> {
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
            (None, None) => Ok(None),
            _ => anyhow::bail!("a certificate and its key are only of use together"),
        }
    }

    fn server_config(&self) -> anyhow::Result<ServerConfig> {
        let (certificate, key) = self.pair()?.context("a certificate is missing")?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = if self.client_auth {
            let ca = self.trusted_ca.as_deref().context(
                "to check clients' certificates, say who signs them: a trusted CA file is missing",
            )?;
            builder.with_client_cert_verifier(verifier(ca, provider)?)
        } else {
            builder.with_no_client_auth()
        };
        let unusable = || format!("the certificate {} is unusable", certificate.display());
        let chain = certificates(certificate)?;
        let private = PrivateKeyDer::from_pem_slice(&read(key)?)
            .map_err(|error| anyhow::anyhow!("{error:?}"))
            .with_context(|| format!("{} holds no private key", key.display()))?;
        let mut config = builder
            .with_single_cert(chain, private)
            .with_context(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn verifier(
    ca: &Path,
    provider: Arc<CryptoProvider>,
) -> anyhow::Result<Arc<dyn tokio_rustls::rustls::server::danger::ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate)?;
    }
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let certificates = certificates
        .map_err(|error| anyhow::anyhow!("{error:?}"))
        .with_context(|| format!("{} is not PEM", path.display()))?;
    anyhow::ensure!(
        !certificates.is_empty(),
        "{} holds no certificate",
        path.display()
    );
    Ok(certificates)
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

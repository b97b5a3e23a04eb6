use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::{ClientTls, Current, ServerTls, TlsError};

/// Files of one side of connections.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// The own certificate chain.
    pub certificate: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Whether clients have to show a certificate.
    pub client_auth: bool,
    /// Who signs what the other side shows.
    pub trusted_ca: Option<PathBuf>,
    /// What is spoken over TLS (ALPN), the best first; not said where it is empty.
    pub protocols: &'static [&'static [u8]],
}

/// When files were changed last, and their lengths.
pub type Stamp = Vec<Option<(SystemTime, u64)>>;

impl TlsFiles {
    /// What a listener needs; `None` if there is no certificate.
    ///
    /// # Errors
    /// Which file is missing or wrong.
    pub fn server(&self) -> Result<Option<ServerTls>, TlsError> {
        if self.certificate.is_none() && self.key.is_none() {
            return if self.client_auth {
                Err(TlsError::NoServerCertificate)
            } else {
                Ok(None)
            };
        }
        Current::new(self, Self::server_config).map(Some)
    }

    /// What who connects needs to show a certificate, and to see one that the trusted CA signed.
    ///
    /// # Errors
    /// Which file is missing or wrong.
    pub fn client(&self) -> Result<ClientTls, TlsError> {
        Current::new(self, Self::client_config)
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

    /// The own certificate and its key, if there are any.
    ///
    /// # Errors
    /// [`TlsError::Pair`] where one of them is missing.
    pub fn pair(&self) -> Result<Option<(&Path, &Path)>, TlsError> {
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
            (None, None) => Ok(None),
            _ => Err(TlsError::Pair),
        }
    }

    fn server_config(&self) -> Result<ServerConfig, TlsError> {
        let (certificate, key) = self.pair()?.ok_or(TlsError::NoCertificate)?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?;
        let builder = if self.client_auth {
            let roots = Arc::new(self.roots()?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build()?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder
            .with_single_cert(certificates(certificate)?, private_key(key)?)
            .map_err(unusable(certificate))?;
        config.alpn_protocols = self.alpn();
        Ok(config)
    }

    fn client_config(&self) -> Result<ClientConfig, TlsError> {
        let (certificate, key) = self.pair()?.ok_or(TlsError::NoCertificate)?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(certificates(certificate)?, private_key(key)?)
            .map_err(unusable(certificate))?;
        config.alpn_protocols = self.alpn();
        // Each connection's certificates are looked at.
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    fn alpn(&self) -> Vec<Vec<u8>> {
        let protocols = self.protocols.iter();
        protocols.map(|protocol| protocol.to_vec()).collect()
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let path = self.trusted_ca.as_deref().ok_or(TlsError::NoTrustedCa)?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path)? {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Untrustable {
                    path: path.into(),
                    source,
                })?;
        }
        Ok(roots)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let none = || TlsError::Content {
        path: path.into(),
        what: "certificate",
    };
    let text = read(path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|_| none())?;
    if certificates.is_empty() {
        return Err(none());
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|_| TlsError::Content {
        path: path.into(),
        what: "private key",
    })
}

fn unusable(path: &Path) -> impl FnOnce(tokio_rustls::rustls::Error) -> TlsError {
    move |source| TlsError::Unusable {
        path: path.into(),
        source,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read {
        path: path.into(),
        source,
    })
}

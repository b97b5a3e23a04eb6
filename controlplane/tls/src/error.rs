use std::io;
use std::path::PathBuf;

use tokio_rustls::rustls::{self, server::VerifierBuilderError};

/// Why certificate files can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file can't be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} holds no {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The certificate is not one for the key, or not one that can be used.
    #[error("the certificate {path} is unusable: {source}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// One of two files is missing.
    #[error("a certificate and its key are only of use together")]
    Pair,
    /// A server has no certificate.
    #[error("a certificate is missing")]
    NoCertificate,
    /// A server is to ask for certificates without one of its own.
    #[error(
        "clients' certificates can only be asked for with a certificate and a key of the server's own"
    )]
    NoServerCertificate,
    /// Nobody is trusted.
    #[error(
        "to check the other side's certificate, say who signs it: a trusted CA file is missing"
    )]
    NoTrustedCa,
    /// What a trusted CA file holds can't sign.
    #[error("{path} holds a certificate that can't be trusted: {source}")]
    Untrustable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// Nobody could be trusted with what the CA file holds.
    #[error("clients' certificates can't be checked: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// The library refuses its own versions of TLS; a defect.
    #[error("TLS can't be set up: {0}")]
    Setup(rustls::Error),
}

//! The certificates of encrypted connections.

use std::path::Path;

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::options::{EtcdOptions, Tls};
use crate::StateError;

/// What connections are encrypted with; `None` where none is.
///
/// # Errors
/// [`StateError::InvalidUrl`] where some endpoints are encrypted and others not, or certificates are given
/// that nobody would ask for; [`StateError::PermissionDenied`] where a file can't be read.
pub(super) fn config(options: &EtcdOptions) -> Result<Option<ClientTlsConfig>, StateError> {
    let wrong = |reason: &str| {
        Err(StateError::InvalidUrl {
            url: format!("etcd:{}", options.endpoints.join(",")),
            reason: reason.into(),
        })
    };
    let endpoints = options.endpoints.iter();
    let encrypted = endpoints.filter(|url| url.starts_with("https://")).count();
    if encrypted == 0 {
        if options.tls != Tls::default() {
            return wrong("ca_file, cert_file and key_file are for endpoints with https://");
        }
        return Ok(None);
    }
    if encrypted < options.endpoints.len() {
        return wrong("some endpoints have https:// and others http://; give all of them the same");
    }
    let mut config = ClientTlsConfig::new();
    config = match &options.tls.ca_file {
        Some(path) => config.ca_certificate(Certificate::from_pem(read(path)?)),
        None => config.with_native_roots(),
    };
    if let Some(identity) = &options.tls.identity {
        let (certificate, key) = (read(&identity.cert_file)?, read(&identity.key_file)?);
        config = config.identity(Identity::from_pem(certificate, key));
    }
    Ok(Some(config))
}

fn read(path: &Path) -> Result<Vec<u8>, StateError> {
    std::fs::read(path).map_err(|error| {
        StateError::PermissionDenied(format!("read the PEM file {}: {error}", path.display()))
    })
}

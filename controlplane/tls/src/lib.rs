//! TLS from certificate files. Files that change are read again: the next connection has what they say
//! then.

mod error;
mod files;

use std::sync::Arc;

use parking_lot::Mutex;
pub use tokio_rustls;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

pub use error::TlsError;
pub use files::{Stamp, TlsFiles};

/// What a listener needs.
pub type ServerTls = Current<ServerConfig>;
/// What who connects needs.
pub type ClientTls = Current<ClientConfig>;

/// A configuration that follows its files.
#[derive(Debug)]
pub struct Current<T> {
    files: TlsFiles,
    load: fn(&TlsFiles) -> Result<T, TlsError>,
    latest: Arc<Mutex<(Stamp, Arc<T>)>>,
}

impl<T> Clone for Current<T> {
    fn clone(&self) -> Self {
        Self {
            files: self.files.clone(),
            load: self.load,
            latest: Arc::clone(&self.latest),
        }
    }
}

impl<T> Current<T> {
    fn new(files: &TlsFiles, load: fn(&TlsFiles) -> Result<T, TlsError>) -> Result<Self, TlsError> {
        let latest = (files.stamp(), Arc::new(load(files)?));
        Ok(Self {
            files: files.clone(),
            load,
            latest: Arc::new(Mutex::new(latest)),
        })
    }

    /// For the next connection. Files that make no sense are as if they had not changed.
    pub fn config(&self) -> Arc<T> {
        let stamp = self.files.stamp();
        let mut latest = self.latest.lock();
        if latest.0 != stamp {
            match (self.load)(&self.files) {
                Ok(config) => {
                    tracing::info!("certificates have changed: new connections have the new ones");
                    latest.1 = Arc::new(config);
                }
                // They may be in the middle of being written: it is said once.
                Err(error) => tracing::warn!("changed certificates are not used: {error}"),
            }
            latest.0 = stamp;
        }
        Arc::clone(&latest.1)
    }
}

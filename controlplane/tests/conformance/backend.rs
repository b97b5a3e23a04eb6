use std::sync::Arc;

use keelson_controlplane::embedded::{EmbeddedOptions, EmbeddedStore, Retention};
use keelson_controlplane::etcd::Server;
use keelson_controlplane::{StateStore, open};
use std::time::Duration;
use tempfile::TempDir;

use crate::etcd_server::EtcdServer;

pub type Store = Arc<dyn StateStore>;

pub struct Embedded {
    pub store: Store,
    _directory: TempDir,
}

impl Embedded {
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut options = EmbeddedOptions::new(directory.path());
        options.retention = Retention::Everything;
        options.progress_interval = Duration::from_millis(200);
        let store = EmbeddedStore::open(options).await.unwrap();
        Self {
            store: Arc::new(store),
            _directory: directory,
        }
    }
}

pub struct Etcd {
    pub store: Store,
    _server: EtcdServer,
}

impl Etcd {
    pub async fn start(server: Server) -> Self {
        let scheme = server.scheme();
        let server = EtcdServer::start_server(server).await;
        let url = format!(
            "{scheme}:{}?prefix=/keelson/&timeout_ms=20000",
            server.url()
        );
        let store = open(&url).await.unwrap();
        Self {
            store,
            _server: server,
        }
    }
}

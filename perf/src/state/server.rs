//! A cluster to measure: one or three members of etcd or of keelson-state.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// keelson-state.
    Keelson,
    /// etcd.
    Etcd,
}

impl Peer {
    pub const ALL: [Self; 2] = [Self::Keelson, Self::Etcd];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keelson => "keelson-state",
            Self::Etcd => "etcd",
        }
    }
}

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    pub keelson: PathBuf,
    pub etcd: PathBuf,
}

/// A running cluster, killed when this is dropped.
pub struct Cluster {
    pub members: Vec<Child>,
    urls: Vec<String>,
    leader: usize,
    _folder: TempDir,
}

impl Cluster {
    /// Starts `count` members with data below `root` and waits until they have a leader.
    pub async fn start(
        peer: Peer,
        programs: &Programs,
        count: usize,
        root: &Path,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("perf-state-")
            .tempdir_in(root)?;
        let urls = free_urls(2 * count)?;
        let (client_urls, peer_urls) = urls.split_at(count);
        let list: Vec<String> = peer_urls
            .iter()
            .enumerate()
            .map(|(at, url)| format!("m{at}={url}"))
            .collect();
        let mut members = Vec::new();
        for at in 0..count {
            let log = std::fs::File::create(folder.path().join(format!("m{at}.log")))?;
            let mut command = match peer {
                Peer::Keelson => {
                    let mut command = Command::new(&programs.keelson);
                    command.args(["--log-level", "warn"]);
                    command
                }
                Peer::Etcd => {
                    let mut command = Command::new(&programs.etcd);
                    // As its documentation says for large loads: the quota is the only default changed.
                    command.args(["--log-level", "warn", "--quota-backend-bytes", "8589934592"]);
                    command
                }
            };
            let child = command
                .args(["--name", &format!("m{at}")])
                .arg("--data-dir")
                .arg(folder.path().join(format!("m{at}")))
                .args(["--listen-client-urls", &client_urls[at]])
                .args(["--advertise-client-urls", &client_urls[at]])
                .args(["--listen-peer-urls", &peer_urls[at]])
                .args(["--initial-advertise-peer-urls", &peer_urls[at]])
                .args(["--initial-cluster", &list.join(",")])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .with_context(|| format!("start {}", peer.name()))?;
            members.push(child);
        }
        let mut cluster = Self {
            members,
            urls: client_urls.to_vec(),
            leader: 0,
            _folder: folder,
        };
        cluster.leader = tokio::time::timeout(Duration::from_secs(30), cluster.find_leader())
            .await
            .with_context(|| format!("{} did not find a leader within 30 s", peer.name()))?;
        Ok(cluster)
    }

    /// The members' addresses for clients.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// Connections to the leader, which does the work that is compared.
    pub async fn connect(&self, count: usize) -> anyhow::Result<Vec<Channel>> {
        let mut channels = Vec::new();
        for _ in 0..count {
            let endpoint = Endpoint::from_shared(self.urls[self.leader].clone())?.tcp_nodelay(true);
            channels.push(endpoint.connect().await?);
        }
        Ok(channels)
    }

    async fn find_leader(&self) -> usize {
        loop {
            for (at, url) in self.urls.iter().enumerate() {
                if leads(url).await.unwrap_or(false) {
                    return at;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn leads(url: &str) -> anyhow::Result<bool> {
    let channel = Endpoint::from_shared(url.to_owned())?.connect().await?;
    let status = MaintenanceClient::new(channel.clone())
        .status(pb::StatusRequest {})
        .await?
        .into_inner();
    let own = status.header.map_or(0, |header| header.member_id);
    if status.leader == 0 || status.leader != own {
        return Ok(false);
    }
    let probe = pb::RangeRequest {
        key: "probe".into(),
        ..pb::RangeRequest::default()
    };
    Ok(KvClient::new(channel).range(probe).await.is_ok())
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

fn free_urls(count: usize) -> anyhow::Result<Vec<String>> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let urls = listeners
        .iter()
        .map(|listener| Ok(format!("http://{}", listener.local_addr()?)));
    urls.collect()
}

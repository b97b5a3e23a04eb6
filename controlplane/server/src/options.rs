//! Flags, named as etcd's where etcd has them.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use keelson_member::keyspace::Member as MemberInfo;

use crate::identity;

/// A member of a replicated state store that speaks etcd v3's API.
#[derive(Debug, Parser)]
#[command(name = "keelson-state", version, max_term_width = 100)]
pub struct Options {
    /// Name of this member.
    #[arg(long, env = "KEELSON_STATE_NAME", default_value = "default")]
    pub name: String,
    /// Folder for its data [default: NAME.keelson].
    #[arg(long, env = "KEELSON_STATE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where to listen for clients, comma-separated.
    #[arg(
        long,
        env = "KEELSON_STATE_LISTEN_CLIENT_URLS",
        value_delimiter = ',',
        default_value = "http://localhost:2379"
    )]
    pub listen_client_urls: Vec<String>,
    /// What clients are told to use [default: those it listens on].
    #[arg(
        long,
        env = "KEELSON_STATE_ADVERTISE_CLIENT_URLS",
        value_delimiter = ','
    )]
    pub advertise_client_urls: Vec<String>,
    /// Where to listen for other members, comma-separated.
    #[arg(
        long,
        env = "KEELSON_STATE_LISTEN_PEER_URLS",
        value_delimiter = ',',
        default_value = "http://localhost:2380"
    )]
    pub listen_peer_urls: Vec<String>,
    /// What other members are told to use.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_ADVERTISE_PEER_URLS",
        value_delimiter = ',',
        default_value = "http://localhost:2380"
    )]
    pub initial_advertise_peer_urls: Vec<String>,
    /// The first members, NAME=PEER-URL, comma-separated [default: this one].
    #[arg(long, env = "KEELSON_STATE_INITIAL_CLUSTER", value_delimiter = ',')]
    pub initial_cluster: Vec<String>,
    /// Whether the cluster is new, or this member joins one.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_CLUSTER_STATE",
        value_enum,
        default_value = "new"
    )]
    pub initial_cluster_state: ClusterState,
    /// Tells clusters apart that have the same URLs.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_CLUSTER_TOKEN",
        default_value = "etcd-cluster"
    )]
    pub initial_cluster_token: String,
    /// Milliseconds between heartbeats.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    pub heartbeat_interval: u64,
    /// Milliseconds without a heartbeat until an election.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(50..=50_000))]
    pub election_timeout: u64,
    /// Operations in one transaction.
    #[arg(long, default_value_t = 128)]
    pub max_txn_ops: usize,
    /// Bytes of one request.
    #[arg(long, default_value_t = 1_572_864)]
    pub max_request_bytes: usize,
    /// Time between progress notifications of watches.
    #[arg(long, default_value = "10m", value_parser = duration)]
    pub watch_progress_notify_interval: Duration,
    /// Memory for the storage engine's cache, in MiB.
    #[arg(long, default_value_t = 16)]
    pub cache_mib: usize,
    /// What to log: error, warn, info, debug, trace, or per module.
    #[arg(long, env = "KEELSON_STATE_LOG", default_value = "info")]
    pub log_level: String,
}

/// Where a member begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClusterState {
    /// The cluster begins with the members of `--initial-cluster`.
    New,
    /// The cluster is there, and knows this member.
    Existing,
}

/// Who this member is, and who the others are.
#[derive(Debug)]
pub struct Identity {
    /// The cluster's id.
    pub cluster_id: u64,
    /// This member's id.
    pub member_id: u64,
    /// The first members.
    pub members: Vec<MemberInfo>,
}

impl Options {
    /// The folder for data.
    pub fn folder(&self) -> PathBuf {
        self.data_dir
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("{}.keelson", self.name)))
    }

    /// The ids that follow from the flags.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        let mut members: Vec<(String, Vec<String>)> = Vec::new();
        for member in &self.initial_cluster {
            let (name, url) = member
                .split_once('=')
                .ok_or_else(|| anyhow::anyhow!("--initial-cluster: {member:?} is not NAME=URL"))?;
            check_url("--initial-cluster", url)?;
            match members.iter_mut().find(|(known, _)| known == name) {
                Some((_, urls)) => urls.push(url.to_owned()),
                None => members.push((name.to_owned(), vec![url.to_owned()])),
            }
        }
        if members.is_empty() {
            members.push((self.name.clone(), self.initial_advertise_peer_urls.clone()));
        }
        let token = &self.initial_cluster_token;
        let members: Vec<MemberInfo> = members
            .into_iter()
            .map(|(name, peer_urls)| MemberInfo {
                id: identity::member_id(&peer_urls, token),
                name,
                peer_urls,
                ..MemberInfo::default()
            })
            .collect();
        let own = members
            .iter()
            .find(|member| member.name == self.name)
            .ok_or_else(|| {
                anyhow::anyhow!(
                    "--initial-cluster does not name this member, {:?}",
                    self.name
                )
            })?;
        let mut advertised = self.initial_advertise_peer_urls.clone();
        let mut listed = own.peer_urls.clone();
        advertised.sort_unstable();
        listed.sort_unstable();
        anyhow::ensure!(
            advertised == listed,
            "--initial-cluster gives {:?} the URLs {listed:?}, --initial-advertise-peer-urls says {advertised:?}",
            self.name
        );
        let ids: Vec<u64> = members.iter().map(|member| member.id).collect();
        let mut unique = ids.clone();
        unique.sort_unstable();
        unique.dedup();
        anyhow::ensure!(
            unique.len() == ids.len(),
            "--initial-cluster names the same URL twice"
        );
        anyhow::ensure!(
            ids.len() <= 7,
            "--initial-cluster names {} members: at most 7",
            ids.len()
        );
        Ok(Identity {
            cluster_id: identity::cluster_id(&ids, token),
            member_id: own.id,
            members,
        })
    }

    /// Ticks until an election.
    pub fn election_ticks(&self) -> anyhow::Result<u32> {
        let ticks = self.election_timeout / self.heartbeat_interval;
        anyhow::ensure!(
            ticks >= 5,
            "--election-timeout {} is less than 5 times --heartbeat-interval {}",
            self.election_timeout,
            self.heartbeat_interval
        );
        Ok(u32::try_from(ticks)?)
    }

    /// Time of a tick.
    pub fn tick(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval)
    }

    /// Shortest time to live of a lease, in seconds: leaders need that long to change.
    pub fn least_lease_ttl(&self) -> anyhow::Result<i64> {
        let least = u64::from(self.election_ticks()?) * 3 / 2 * self.heartbeat_interval;
        Ok(i64::try_from(least.div_ceil(1000))?)
    }

    /// What clients are told to use.
    pub fn client_urls(&self) -> Vec<String> {
        if self.advertise_client_urls.is_empty() {
            self.listen_client_urls.clone()
        } else {
            self.advertise_client_urls.clone()
        }
    }
}

/// Addresses that a flag's URLs stand for.
pub fn addresses(flag: &str, urls: &[String]) -> anyhow::Result<Vec<SocketAddr>> {
    let mut addresses = Vec::new();
    for url in urls {
        let address = check_url(flag, url)?;
        let resolved: Vec<SocketAddr> = address
            .to_socket_addrs()
            .map_err(|error| anyhow::anyhow!("{flag}: {url}: {error}"))?
            .collect();
        // As etcd: localhost is one address, IPv4 if there is one.
        let chosen = resolved
            .iter()
            .find(|address| address.is_ipv4())
            .or(resolved.first());
        addresses.extend(chosen);
    }
    Ok(addresses)
}

fn check_url<'a>(flag: &str, url: &'a str) -> anyhow::Result<&'a str> {
    identity::address(url).ok_or_else(|| anyhow::anyhow!("{flag}: {url:?} is not http://HOST:PORT"))
}

/// Parses `10m`, `1s`, `500ms`: at least a millisecond.
fn duration(text: &str) -> Result<Duration, String> {
    let duration: jiff::SignedDuration = text
        .parse()
        .map_err(|error: jiff::Error| error.to_string())?;
    let duration =
        Duration::try_from(duration).map_err(|_| "it must not be negative".to_owned())?;
    if duration < Duration::from_millis(1) {
        return Err("it must be at least 1ms".into());
    }
    Ok(duration)
}

//! Flags, named as etcd's where etcd has them.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use keelson_member::keyspace::Member as MemberInfo;

use crate::compactor::Retention;
use crate::identity;
use crate::tls::{PROTOCOLS, TlsFiles};

/// A member of a replicated state store that speaks etcd v3's API.
#[derive(Debug, Parser)]
#[command(name = "keelson-state", version, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub member: MemberFlags,
    #[command(flatten)]
    pub tls: TlsFlags,
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
    /// Whether the cluster is new, or this member joins one. Of no effect once the member has data.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_CLUSTER_STATE",
        value_enum,
        default_value = "new"
    )]
    pub initial_cluster_state: ClusterState,
    /// Takes the place of a member that is gone for good (name or id): removes it, joins as a
    /// learner, and gets a vote when it has caught up. Refused while that member is there. Of no
    /// effect once the member has data and a vote.
    #[arg(long, value_name = "MEMBER")]
    pub replace: Option<String>,
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
    #[arg(long, default_value_t = 1_572_864, value_parser = clap::value_parser!(u64).range(1024..=33_554_432))]
    pub max_request_bytes: u64,
    /// Bytes of keys and values in one answer to a range; RangeStream has no such limit.
    #[arg(long, default_value_t = 536_870_912, value_parser = clap::value_parser!(u64).range(2_097_152..=2_000_000_000))]
    pub max_response_bytes: u64,
    /// What `--auto-compaction-retention` counts.
    #[arg(long, value_enum, default_value = "periodic")]
    pub auto_compaction_mode: CompactionMode,
    /// History that is kept: a time (`5m`; a number is hours), or revisions; 0 keeps all.
    #[arg(long, default_value = "0")]
    pub auto_compaction_retention: String,
    /// Learners that the cluster may have.
    #[arg(long, default_value_t = 1)]
    pub max_learners: usize,
    /// Time between progress notifications of watches.
    #[arg(long, default_value = "10m", value_parser = duration)]
    pub watch_progress_notify_interval: Duration,
    /// How long a token of a user is good for, in seconds.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    pub auth_token_ttl: u64,
    /// Work that a hash of a password takes: twice as much for each one more.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,
    /// Room that is to be free on the disk, in MiB, or a tenth of the disk if that is less: with
    /// less, what needs more is refused, and the alarm NOSPACE is raised until there is room.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub disk_reserve_mib: u64,
    /// Memory for the storage engine's cache, in MiB.
    #[arg(long, default_value_t = 16)]
    pub cache_mib: usize,
    /// What to log: error, warn, info, debug, trace, or per module.
    #[arg(long, env = "KEELSON_STATE_LOG", default_value = "info", global = true)]
    pub log_level: String,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Works with backups, which `etcdctl snapshot save` takes.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Makes a new cluster of one member from the folder of any member of a cluster that has lost
    /// its quorum for good. The folder is copied. What this member had of the log is applied, also
    /// what may never have been committed; history is compacted, so that watchers notice.
    Recover {
        /// The folder of the member that is left.
        from: PathBuf,
        #[command(flatten)]
        member: Box<MemberFlags>,
        /// Adds to the revision, so that no revision that a client has seen comes again.
        #[arg(long, default_value_t = 1_000_000_000, value_parser = clap::value_parser!(i64).range(0..))]
        bump_revision: i64,
    },
}

/// Works with backups.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Checks a backup and says what is in it.
    Status {
        /// The backup.
        file: PathBuf,
        /// How to say it.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Makes the data folder of a member of a new cluster from a backup. Every member is restored
    /// from the same file, each with its own name.
    Restore {
        /// The backup.
        file: PathBuf,
        #[command(flatten)]
        member: Box<MemberFlags>,
        /// Adds to the revision, so that watchers notice what they have missed.
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
        bump_revision: i64,
        /// Compacts history at the restored revision, so that watches from before are canceled.
        #[arg(long)]
        mark_compacted: bool,
    },
}

/// How something is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For machines.
    Json,
}

/// Who a member is when it begins. Of no effect once it has data, but for name and folder.
#[derive(Debug, Args)]
pub struct MemberFlags {
    /// Name of this member.
    #[arg(long, env = "KEELSON_STATE_NAME", default_value = "default")]
    pub name: String,
    /// Folder for its data [default: NAME.keelson].
    #[arg(long, env = "KEELSON_STATE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// What other members are told to use.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_ADVERTISE_PEER_URLS",
        value_delimiter = ',',
        default_value = "http://localhost:2380"
    )]
    pub initial_advertise_peer_urls: Vec<String>,
    /// The members, NAME=PEER-URL, comma-separated [default: this one].
    #[arg(long, env = "KEELSON_STATE_INITIAL_CLUSTER", value_delimiter = ',')]
    pub initial_cluster: Vec<String>,
    /// Tells clusters apart that have the same URLs.
    #[arg(
        long,
        env = "KEELSON_STATE_INITIAL_CLUSTER_TOKEN",
        default_value = "etcd-cluster"
    )]
    pub initial_cluster_token: String,
}

/// Files for TLS.
#[derive(Debug, Args)]
pub struct TlsFlags {
    /// Certificate chain that clients are shown (PEM).
    #[arg(long, env = "KEELSON_STATE_CERT_FILE")]
    pub cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, env = "KEELSON_STATE_KEY_FILE")]
    pub key_file: Option<PathBuf>,
    /// Clients must show a certificate; its common name is their user.
    #[arg(long)]
    pub client_cert_auth: bool,
    /// Who signs clients' certificates (PEM).
    #[arg(long, env = "KEELSON_STATE_TRUSTED_CA_FILE")]
    pub trusted_ca_file: Option<PathBuf>,
    /// Certificate chain that members show to each other (PEM).
    #[arg(long, env = "KEELSON_STATE_PEER_CERT_FILE")]
    pub peer_cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, env = "KEELSON_STATE_PEER_KEY_FILE")]
    pub peer_key_file: Option<PathBuf>,
    /// Members must show a certificate to each other.
    #[arg(long)]
    pub peer_client_cert_auth: bool,
    /// Who signs members' certificates (PEM).
    #[arg(long, env = "KEELSON_STATE_PEER_TRUSTED_CA_FILE")]
    pub peer_trusted_ca_file: Option<PathBuf>,
}

/// How history that is kept is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompactionMode {
    /// By time.
    Periodic,
    /// By revisions.
    Revision,
}

/// Where a member begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClusterState {
    /// The cluster begins with the members of `--initial-cluster`.
    New,
    /// The cluster is there, and knows this member.
    Existing,
}

/// The first members of a cluster, and which of them this is.
#[derive(Debug)]
pub struct Founders {
    /// The cluster's id.
    pub cluster_id: u64,
    /// This member's id.
    pub member_id: u64,
    /// All of them.
    pub members: Vec<MemberInfo>,
}

impl TlsFlags {
    /// Those for clients.
    pub fn clients(&self) -> TlsFiles {
        TlsFiles {
            certificate: self.cert_file.clone(),
            key: self.key_file.clone(),
            client_auth: self.client_cert_auth,
            trusted_ca: self.trusted_ca_file.clone(),
            protocols: PROTOCOLS,
        }
    }

    /// Those for other members.
    pub fn peers(&self) -> TlsFiles {
        TlsFiles {
            certificate: self.peer_cert_file.clone(),
            key: self.peer_key_file.clone(),
            client_auth: self.peer_client_cert_auth,
            trusted_ca: self.peer_trusted_ca_file.clone(),
            protocols: PROTOCOLS,
        }
    }
}

impl MemberFlags {
    /// The folder for data.
    pub fn folder(&self) -> PathBuf {
        self.data_dir
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("{}.keelson", self.name)))
    }

    /// Names and peer URLs that `--initial-cluster` lists, this member's among them.
    pub fn members(&self) -> anyhow::Result<Vec<(String, Vec<String>)>> {
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
        let own = members.iter().find(|(name, _)| *name == self.name);
        let (_, listed) = own.ok_or_else(|| {
            anyhow::anyhow!(
                "--initial-cluster does not name this member, {:?}",
                self.name
            )
        })?;
        let mut advertised = self.initial_advertise_peer_urls.clone();
        let mut listed = listed.clone();
        advertised.sort_unstable();
        listed.sort_unstable();
        anyhow::ensure!(
            advertised == listed,
            "--initial-cluster gives {:?} the URLs {listed:?}, --initial-advertise-peer-urls says {advertised:?}",
            self.name
        );
        Ok(members)
    }

    /// The first members of a new cluster.
    pub fn founders(&self) -> anyhow::Result<Founders> {
        let token = &self.initial_cluster_token;
        let members: Vec<MemberInfo> = self
            .members()?
            .into_iter()
            .map(|(name, peer_urls)| MemberInfo {
                id: identity::member_id(&peer_urls, token),
                name,
                peer_urls,
                ..MemberInfo::default()
            })
            .collect();
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
        let own = members.iter().find(|member| member.name == self.name);
        Ok(Founders {
            cluster_id: identity::cluster_id(&ids, token),
            member_id: own.map_or(0, |own| own.id),
            members,
        })
    }
}

impl Options {
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

    /// How much history automatic compaction keeps; `None` if there is none.
    pub fn retention(&self) -> anyhow::Result<Option<Retention>> {
        let text = self.auto_compaction_retention.trim();
        let number = text.parse::<u32>();
        if number == Ok(0) {
            return Ok(None);
        }
        let what = || format!("--auto-compaction-retention {text:?}");
        Ok(Some(match (self.auto_compaction_mode, number) {
            (CompactionMode::Revision, Ok(count)) => Retention::Revisions(i64::from(count)),
            (CompactionMode::Revision, Err(error)) => {
                return Err(error).with_context(|| format!("{}: not a number", what()));
            }
            (CompactionMode::Periodic, Ok(hours)) => {
                Retention::Time(Duration::from_secs(u64::from(hours) * 3600))
            }
            (CompactionMode::Periodic, Err(_)) => {
                let time =
                    duration(text).map_err(|error| anyhow::anyhow!("{}: {error}", what()))?;
                Retention::Time(time)
            }
        }))
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

/// An address to listen on.
#[derive(Debug, Clone, Copy)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub tls: bool,
}

/// Addresses that a flag's URLs stand for.
pub fn addresses(flag: &str, urls: &[String]) -> anyhow::Result<Vec<Listen>> {
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
        addresses.extend(chosen.map(|address| Listen {
            address: *address,
            tls: url.starts_with("https://"),
        }));
    }
    Ok(addresses)
}

fn check_url<'a>(flag: &str, url: &'a str) -> anyhow::Result<&'a str> {
    identity::address(url).ok_or_else(|| {
        anyhow::anyhow!("{flag}: {url:?} is not http://HOST:PORT or https://HOST:PORT")
    })
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

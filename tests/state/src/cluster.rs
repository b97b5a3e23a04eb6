use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tempfile::TempDir;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

/// What runs as a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// keelson-state, built beside the tests.
    KeelsonState,
    /// The etcd that `setup/etcd` fetched.
    Etcd,
}

/// A cluster on this machine; its members are killed when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// What is run as a member from now on.
    program: PathBuf,
    folder: TempDir,
    client_urls: Vec<String>,
    peer_urls: Vec<String>,
    members: Vec<Option<Child>>,
    flags: Vec<String>,
    tls: Option<ClientTlsConfig>,
    /// What each member finds in its environment.
    variables: BTreeMap<usize, Vec<(OsString, OsString)>>,
}

impl Cluster {
    /// Starts `count` members with `flags` beside those of every test, and waits until they answer.
    pub async fn start(program: Program, count: usize, flags: &[&str]) -> Self {
        Self::start_with(program, count, flags, None).await
    }

    /// As [`Cluster::start`]; `prepare` may first make the place where a member's data goes.
    pub async fn start_on(
        program: Program,
        count: usize,
        flags: &[&str],
        prepare: impl Fn(usize, &Path),
    ) -> Self {
        Self::start_prepared(program.path(), count, flags, None, prepare).await
    }

    /// As [`Cluster::start`]; with TLS everywhere if `tls` says how a client connects.
    pub async fn start_with(
        program: Program,
        count: usize,
        flags: &[&str],
        tls: Option<ClientTlsConfig>,
    ) -> Self {
        Self::start_prepared(program.path(), count, flags, tls, |_, _| {}).await
    }

    /// As [`Cluster::start`], with another build of the program.
    pub async fn start_build(program: &Path, count: usize) -> Self {
        Self::start_prepared(program.to_owned(), count, &[], None, |_, _| {}).await
    }

    /// Members that are run from now on are of another build.
    pub fn use_build(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    async fn start_prepared(
        program: PathBuf,
        count: usize,
        flags: &[&str],
        tls: Option<ClientTlsConfig>,
        prepare: impl Fn(usize, &Path),
    ) -> Self {
        let urls = |count| {
            let urls = free_urls(count).into_iter();
            match tls {
                Some(_) => urls.map(|url| url.replace("http:", "https:")).collect(),
                None => urls.collect(),
            }
        };
        let mut client_urls: Vec<String> = urls(2 * count);
        let mut cluster = Self {
            program,
            folder: tempfile::tempdir().unwrap(),
            peer_urls: client_urls.split_off(count),
            client_urls,
            members: Vec::new(),
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            tls,
            variables: BTreeMap::new(),
        };
        cluster.members.resize_with(count, || None);
        for at in 0..count {
            prepare(at, &cluster.data(at));
            cluster.run(at);
        }
        for at in 0..count {
            cluster.wait_for(at).await;
        }
        cluster
    }

    /// Makes room for one more member, which the cluster has to be told of before it runs: its
    /// number and its peer URL.
    pub fn make_room(&mut self) -> (usize, String) {
        // At once, or the second could be the first.
        let mut urls = free_urls(2);
        self.client_urls.extend(urls.pop());
        self.peer_urls.extend(urls.pop());
        self.members.push(None);
        let at = self.members.len() - 1;
        (at, self.peer_urls[at].clone())
    }

    /// Runs a member that the cluster was told of.
    pub fn join(&mut self, at: usize) {
        self.run_with(at, &["--initial-cluster-state", "existing"]);
    }

    /// Runs a member with flags of its own beside those of all.
    pub fn run_as(&mut self, at: usize, flags: &[&str]) {
        self.run_with(at, flags);
    }

    /// Has a member that is run from now on find these variables in its environment.
    pub fn set_variables(&mut self, at: usize, variables: &[(OsString, OsString)]) {
        self.variables.insert(at, variables.to_vec());
    }

    /// Runs a member that is not running.
    pub fn run(&mut self, at: usize) {
        self.run_with(at, &[]);
    }

    fn run_with(&mut self, at: usize, flags: &[&str]) {
        let list: Vec<String> = self
            .peer_urls
            .iter()
            .enumerate()
            .map(|(at, url)| format!("m{at}={url}"))
            .collect();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(at))
            .unwrap();
        let process = Command::new(&self.program)
            .args(["--name", &format!("m{at}")])
            .arg("--data-dir")
            .arg(self.data(at))
            .args(["--listen-client-urls", &self.client_urls[at]])
            .args(["--advertise-client-urls", &self.client_urls[at]])
            .args(["--listen-peer-urls", &self.peer_urls[at]])
            .args(["--initial-advertise-peer-urls", &self.peer_urls[at]])
            .args(["--initial-cluster", &list.join(",")])
            .args(&self.flags)
            .args(flags)
            .envs(self.variables.get(&at).cloned().unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "run {}: {error}: `./test` fetches and builds it",
                    self.program.display()
                )
            });
        self.members[at] = Some(process);
    }

    /// Lets members that run have the processor before others: what they do takes no time, but is waited for.
    pub fn prefer(&self) {
        for process in self.members.iter().flatten() {
            let id = process.id().to_string();
            let status = Command::new("renice")
                .args(["-n", "-10", "-p", &id])
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert!(status.success(), "renice -n -10 -p {id}");
        }
    }

    /// Kills a member as a crash would.
    pub fn kill(&mut self, at: usize) {
        if let Some(mut process) = self.members[at].take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Sends a signal to a member's process: `STOP`, `CONT`, `TERM`.
    pub fn signal(&self, at: usize, name: &str) {
        let process = self.members[at].as_ref().unwrap().id().to_string();
        let status = Command::new("kill")
            .args(["-s", name, &process])
            .status()
            .unwrap();
        assert!(status.success(), "kill -s {name} {process}");
    }

    /// Waits for a leader; its number.
    pub async fn leader(&self) -> usize {
        let limit = Instant::now() + Duration::from_mins(2);
        while Instant::now() < limit {
            for at in 0..self.members.len() {
                if self.leads(at).await {
                    return at;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("there is no leader");
    }

    /// Waits until a member's process ends by itself; what it logged.
    pub async fn end_of(&mut self, at: usize) -> String {
        let limit = Instant::now() + Duration::from_mins(2);
        let mut process = self.members[at].take().unwrap();
        while process.try_wait().unwrap().is_none() {
            if Instant::now() > limit {
                process.kill().unwrap();
                panic!("member {at} goes on:\n{}", self.log_of(at));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.log_of(at)
    }

    /// The hash of all keys of a member that serves, and the revision that it is of.
    pub async fn hash(&self, at: usize) -> (u32, i64) {
        let mut client = MaintenanceClient::new(self.connect(at).await);
        let request = pb::HashKvRequest { revision: 0 };
        let answer = client.hash_kv(request).await.unwrap().into_inner();
        (answer.hash, answer.hash_revision)
    }

    /// Memory that a member has, in bytes.
    pub fn resident_bytes(&self, at: usize) -> u64 {
        let process = self.members[at].as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() * 1024
    }

    /// What a member logged.
    pub fn log_of(&self, at: usize) -> String {
        std::fs::read_to_string(self.log(at)).unwrap_or_default()
    }

    /// Where clients reach a member.
    pub fn client_url(&self, at: usize) -> &str {
        &self.client_urls[at]
    }

    /// Where members reach a member.
    pub fn peer_url(&self, at: usize) -> &str {
        &self.peer_urls[at]
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A connection to a member.
    pub async fn connect(&self, at: usize) -> Channel {
        match self.endpoint(at).connect().await {
            Ok(channel) => channel,
            Err(error) => panic!("member {at}: {error:?}\n{}", self.log_of(at)),
        }
    }

    /// A connection to a member that may not be there.
    pub async fn try_connect(&self, at: usize) -> Result<Channel, tonic::transport::Error> {
        self.endpoint(at).connect().await
    }

    /// Waits until a member answers reads that need a leader.
    pub async fn wait_for(&self, at: usize) {
        let limit = Instant::now() + Duration::from_mins(2);
        loop {
            if self.answers(at).await {
                return;
            }
            assert!(
                Instant::now() < limit,
                "member {at} does not answer:\n{}",
                self.log_of(at)
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A member's folder.
    pub fn data(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("m{at}"))
    }

    fn endpoint(&self, at: usize) -> Endpoint {
        let endpoint = Endpoint::from_shared(self.client_urls[at].clone()).unwrap();
        match &self.tls {
            Some(tls) => endpoint.tls_config(tls.clone()).unwrap(),
            None => endpoint,
        }
    }

    async fn answers(&self, at: usize) -> bool {
        let Ok(channel) = self.endpoint(at).connect().await else {
            return false;
        };
        let request = pb::RangeRequest {
            key: "ready".into(),
            ..pb::RangeRequest::default()
        };
        KvClient::new(channel).range(request).await.is_ok()
    }

    async fn leads(&self, at: usize) -> bool {
        if self.members[at].is_none() {
            return false;
        }
        let Ok(channel) = self.endpoint(at).connect().await else {
            return false;
        };
        let mut client = MaintenanceClient::new(channel);
        let status = client.status(pb::StatusRequest {});
        match tokio::time::timeout(Duration::from_secs(1), status).await {
            Ok(Ok(status)) => {
                let status = status.into_inner();
                status
                    .header
                    .is_some_and(|header| header.member_id == status.leader)
            }
            _ => false,
        }
    }

    fn log(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("m{at}.log"))
    }
}

impl Program {
    /// Where the program is.
    pub fn path(self) -> PathBuf {
        match self {
            Self::KeelsonState => {
                let test = std::env::current_exe().unwrap();
                test.ancestors().nth(2).unwrap().join("keelson-state")
            }
            Self::Etcd => etcd_folder().join("etcd"),
        }
    }
}

/// Where `etcdctl` is.
pub fn etcdctl() -> PathBuf {
    etcd_folder().join("etcdctl")
}

fn etcd_folder() -> PathBuf {
    let cache = std::env::var_os("KEELSON_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/keelson"),
        PathBuf::from,
    );
    cache.join("etcd")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for at in 0..self.members.len() {
            self.kill(at);
        }
    }
}

/// A loopback address that belongs to this process, so that no other test takes its ports.
pub fn address() -> Ipv4Addr {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, a.saturating_add(1), b, c.clamp(1, 254))
}

/// URLs with ports that are free until the servers take them.
fn free_urls(count: usize) -> Vec<String> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind((address(), 0)).unwrap())
        .collect();
    listeners
        .iter()
        .map(|listener| format!("http://{}", listener.local_addr().unwrap()))
        .collect()
}

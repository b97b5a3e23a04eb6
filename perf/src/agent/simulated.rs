//! Many agents with simulated guests on one state store: what it takes to bring all objects where they
//! should be, to keep them there, and to follow one change.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_agent::config::Config;
use keelson_agent::host::HostNetwork;
use keelson_agent::{Agent, Reconciler, SimulatedGuests, serve};
use keelson_controlplane::{PutRequest, StateStore, StateStoreExt as _};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::{Client, guest, runs};
use super::counting_store::{CountingStore, Requests};

/// How long a simulated guest takes to start.
const START_TIME: Duration = Duration::from_millis(20);
/// Long enough that no host is lost while the machine is busy with a hundred of them.
const LEASE_SECONDS: u64 = 120;
const LIMIT: Duration = Duration::from_mins(10);
/// Networks and security groups; guests are spread over them.
const NETWORKS: usize = 10;
/// Changes that are followed, one after the other.
const CHANGES: usize = 20;
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);
/// No change takes longer to have come through.
const SETTLED: Duration = Duration::from_millis(500);

/// How large a fleet is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Hosts.
    pub hosts: usize,
    /// Objects beside the hosts.
    pub objects: usize,
}

impl Size {
    /// The name of what is measured.
    pub fn work(self) -> String {
        format!("{} objects, {} hosts", self.objects, self.hosts)
    }
}

/// The network that all simulated hosts share: that of this machine.
pub async fn network() -> anyhow::Result<HostNetwork> {
    Ok(HostNetwork::open(&config(&std::env::temp_dir(), 0)).await?)
}

/// Measures a fleet of this size on the state store at `url`, which is empty.
///
/// It has an asynchronous runtime of its own, with which all that agents do ends.
pub fn measure(
    url: &str,
    network: &HostNetwork,
    size: Size,
    idle: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let figures = runtime.block_on(figures(url, network, size, idle));
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    figures
}

async fn figures(
    url: &str,
    network: &HostNetwork,
    size: Size,
    idle: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let fleet = Fleet::start(url, network, size.hosts).await?;
    let image = fleet.folder.path().join("image");
    std::fs::write(&image, [0; 4096])?;
    let (objects, names) = objects(size.objects, &image);
    let mut client = fleet.client.clone();
    let (begun, cpu) = (Instant::now(), processor_seconds());
    client.apply(&objects).await?;
    let accepted = begun.elapsed();
    client.wait_for(&names, LIMIT, runs).await?;
    let (took, cpu) = (begun.elapsed(), processor_seconds() - cpu);
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let (requests, guests) = (fleet.requests.total() as f64, names.len() as f64);
    let mut figures = BTreeMap::from([
        ("all_run_s", took.as_secs_f64()),
        ("accepted_s", accepted.as_secs_f64()),
        ("requests_per_guest", requests / guests),
        ("cpu_ms_per_guest", cpu * 1e3 / guests),
    ]);
    fleet.settle().await;
    figures.extend(fleet.idle(idle).await);
    figures.extend(fleet.changes(&names).await?);
    Ok(figures)
}

struct Fleet {
    requests: Arc<Requests>,
    store: Arc<dyn StateStore>,
    client: Client,
    folder: TempDir,
}

impl Fleet {
    async fn start(url: &str, network: &HostNetwork, hosts: usize) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("perf-fleet-").tempdir()?;
        let config = |at: usize| config(folder.path(), at);
        let requests = Arc::new(Requests::default());
        for at in 0..hosts {
            let store = keelson_controlplane::open(url).await?;
            let store = Arc::new(CountingStore::new(store, Arc::clone(&requests)));
            let guests = SimulatedGuests::new(START_TIME);
            let agent = Agent::simulated(config(at), store, network.clone(), guests).await?;
            agent.join_fleet().await?;
            tokio::spawn(Reconciler::new(agent.clone()).run());
            if at == 0 {
                tokio::spawn(async move {
                    if let Err(error) = serve(agent, std::future::pending()).await {
                        eprintln!("the agent that is asked ended: {error}");
                    }
                });
            }
        }
        let mut client = Client::new(&config(0).socket);
        client.ready().await?;
        Ok(Self {
            requests,
            store: keelson_controlplane::open(url).await?,
            client,
            folder,
        })
    }

    /// Waits until nothing has been asked of the store for a while.
    async fn settle(&self) -> Duration {
        let begun = Instant::now();
        let mut last = (self.requests.total(), Instant::now());
        while last.1.elapsed() < SETTLED {
            tokio::time::sleep(Duration::from_millis(2)).await;
            let now = self.requests.total();
            if now != last.0 {
                last = (now, Instant::now());
            }
        }
        last.1 - begun
    }

    /// What is asked of the store while nothing changes, and what that costs.
    async fn idle(&self, idle: Duration) -> BTreeMap<&'static str, f64> {
        let (requests, renewals) = (self.requests.total(), self.requests.keep_alives());
        let cpu = processor_seconds();
        tokio::time::sleep(idle).await;
        let seconds = idle.as_secs_f64();
        #[allow(clippy::cast_precision_loss)] // far below 2^52
        let per_second = |before: u64, now: u64| (now - before) as f64 / seconds;
        BTreeMap::from([
            (
                "idle_requests_per_s",
                per_second(requests, self.requests.total()),
            ),
            (
                "idle_renewals_per_s",
                per_second(renewals, self.requests.keep_alives()),
            ),
            (
                "idle_cpu_percent",
                (processor_seconds() - cpu) / seconds * 100.0,
            ),
        ])
    }

    /// What one change costs: a guest is given another label, a security group another rule, in turn.
    async fn changes(&self, names: &[String]) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        let mut figures = BTreeMap::new();
        for (kind, requests_name, cpu_name) in [
            (
                "virtualmachines",
                "requests_per_guest_change",
                "cpu_ms_per_guest_change",
            ),
            (
                "disks",
                "requests_per_disk_change",
                "cpu_ms_per_disk_change",
            ),
        ] {
            let (requests, cpu) = (self.requests.total(), processor_seconds());
            for at in 0..CHANGES {
                let name = match kind {
                    "disks" => format!("disk-{at}"),
                    _ => names[at * names.len() / CHANGES].clone(),
                };
                self.change(&format!("/keelson.dev/v1alpha1/objects/{kind}/{name}"))
                    .await?;
                self.settle().await;
            }
            #[allow(clippy::cast_precision_loss)] // far below 2^52
            let (requests, changes) = ((self.requests.total() - requests) as f64, CHANGES as f64);
            figures.insert(requests_name, requests / changes);
            figures.insert(cpu_name, (processor_seconds() - cpu) * 1e3 / changes);
        }
        Ok(figures)
    }

    /// Changes an object as an admission does, without one: what that reads is not what is measured here.
    async fn change(&self, key: &str) -> anyhow::Result<()> {
        let found = self.store.get(key.as_bytes()).await?;
        let found = found.with_context(|| format!("{key} is not there"))?;
        let mut object: Value = serde_json::from_slice(&found.value)?;
        let generation = object["metadata"]["generation"].as_i64().unwrap_or(1) + 1;
        object["metadata"]["generation"] = generation.into();
        object["metadata"]["labels"]["changed"] = generation.to_string().into();
        let put = PutRequest::new(key, serde_json::to_vec(&object)?);
        self.store.put(put).await?;
        Ok(())
    }
}

fn config(folder: &Path, at: usize) -> Config {
    let place = folder.join(format!("host-{at}"));
    Config {
        socket: place.join("keelsond.sock"),
        run_directory: place.join("run"),
        log_directory: place.join("log"),
        snapshot_directory: place.join("snapshots"),
        bpf_directory: "/sys/fs/bpf/perf-fleet".into(),
        host_name: Some(format!("host-{at}")),
        host_lease_seconds: LEASE_SECONDS,
        // This machine's processors, as if it had as many as its guests need.
        cpu_overcommit: 1000,
        ..Config::default()
    }
}

/// Networks, security groups and disks, and guests that use them; and the guests' names.
fn objects(count: usize, image: &Path) -> (Vec<Value>, Vec<String>) {
    let object = |kind: &str, name: String, spec: Value| {
        json!({"apiVersion": "keelson.dev/v1alpha1", "kind": kind, "metadata": {"name": name},
            "spec": spec})
    };
    let guests = count - 2 * NETWORKS - CHANGES;
    let mut objects = Vec::new();
    for at in 0..NETWORKS {
        let spec = json!({"subnet": format!("10.{}.0.0/16", 100 + at)});
        objects.push(object("Network", format!("net-{at}"), spec));
        // Each lets in the members of the next one.
        let next = format!("group-{}", (at + 1) % NETWORKS);
        let rule = json!({"protocol": "tcp", "ports": [80], "fromGroups": [next]});
        let spec = json!({"ingress": [rule]});
        objects.push(object("SecurityGroup", format!("group-{at}"), spec));
    }
    for at in 0..CHANGES {
        let spec = json!({"path": image, "shared": true});
        objects.push(object("Disk", format!("disk-{at}"), spec));
    }
    let names: Vec<String> = (0..guests).map(|at| format!("guest-{at}")).collect();
    for (at, name) in names.iter().enumerate() {
        let mut guest = guest(name, "32Mi", Path::new("/boot/kernel"), "");
        let network = at % NETWORKS;
        guest["spec"]["interfaces"] = json!([{"name": "eth0", "network": format!("net-{network}"),
            "securityGroups": [format!("group-{network}")]}]);
        objects.push(guest);
    }
    (objects, names)
}

/// What this process has used of processors, which are all agents together.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let (seconds, nanoseconds) = (time.tv_sec as f64, time.tv_nsec as f64);
    seconds + nanoseconds / 1e9
}

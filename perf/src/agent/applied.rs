//! One agent: how long from `apply` until guests run, and what it takes while they do nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_vmm::api::GuestState;
use keelson_vmm::client::VmmClient;
use keelson_vmm_tests::{GuestBuilder, payload};

use super::client::{Client, guest, runs};
use super::host::Host;
use super::{AGENT, ALONE, Add};
use crate::process;

/// How many guests are applied at once.
pub const COUNTS: [usize; 3] = [1, 10, 100];
const MEMORY_MIB: u64 = 32;
const LIMIT: Duration = Duration::from_mins(2);
const POLL: Duration = Duration::from_micros(500);

/// The names of work: `apply to running, N guests`.
pub fn work(count: usize) -> String {
    format!("apply to running, {count} guests")
}

/// One round of all of it.
pub async fn measure(
    keelsond: &Path,
    root: &Path,
    idle: Duration,
    round: u32,
    add: &mut Add<'_>,
) -> anyhow::Result<()> {
    alone(round, add)?;
    let host = Host::start(keelsond, root, None, "")?;
    let mut client = host.client();
    client.ready().await?;
    for count in COUNTS {
        let names: Vec<String> = (0..count).map(|at| format!("guest-{at}")).collect();
        let memory = format!("{MEMORY_MIB}Mi");
        let objects: Vec<_> = names
            .iter()
            .map(|name| guest(name, &memory, payload(), "hang"))
            .collect();
        let cpu = process::usage(std::slice::from_ref(host.agent()))?.cpu_seconds;
        let begun = Instant::now();
        client.apply(&objects).await?;
        let accepted = begun.elapsed();
        client.wait_for(&names, LIMIT, runs).await?;
        let took = begun.elapsed();
        let cpu = process::usage(std::slice::from_ref(host.agent()))?.cpu_seconds - cpu;
        let figures = [
            ("ms", took.as_secs_f64() * 1e3),
            ("accepted_ms", accepted.as_secs_f64() * 1e3),
            ("agent_cpu_ms", cpu * 1e3),
        ];
        add(AGENT, &work(count), round, &BTreeMap::from(figures));
        if count == COUNTS[COUNTS.len() - 1] {
            let figures = idle_figures(host.agent(), idle).await?;
            add(AGENT, "100 idle guests", round, &figures);
        }
        delete(&mut client, &names).await?;
    }
    Ok(())
}

async fn delete(client: &mut Client, names: &[String]) -> anyhow::Result<()> {
    // No payload guest obeys its power button here: `stopTimeout` would pass for each.
    client.kill(names).await?;
    client.delete(names).await?;
    client.wait_for(names, LIMIT, |guest| guest.is_none()).await
}

/// How long a guest takes by itself: keelson-vmm, from when it is started until its processor runs.
fn alone(round: u32, add: &mut Add<'_>) -> anyhow::Result<()> {
    for _ in 0..3 {
        let begun = Instant::now();
        let guest = GuestBuilder::new("hang")
            .set("/memory/size_mib", MEMORY_MIB)
            .start();
        let socket = guest.api_socket();
        let running = || {
            let status = VmmClient::connect(&socket).and_then(|mut client| client.status());
            status.is_ok_and(|status| status.state == GuestState::Running)
        };
        while !running() {
            anyhow::ensure!(begun.elapsed() < LIMIT, "the guest doesn't start");
            std::thread::sleep(POLL);
        }
        let took = begun.elapsed().as_secs_f64() * 1e3;
        add(
            ALONE,
            "a guest's own start",
            round,
            &BTreeMap::from([("ms", took)]),
        );
        guest.client().kill()?;
        guest.wait();
    }
    Ok(())
}

/// The agent's memory, and its share of one processor while nothing happens.
async fn idle_figures(
    agent: &Child,
    idle: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    // What the start left to do is not idleness.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = process::usage(std::slice::from_ref(agent))?.cpu_seconds;
    tokio::time::sleep(idle).await;
    let cpu = process::usage(std::slice::from_ref(agent))?.cpu_seconds - before;
    Ok(BTreeMap::from([
        ("cpu_percent", cpu / idle.as_secs_f64() * 100.0),
        ("memory_mib", resident_mib(agent)?),
    ]))
}

/// `VmRSS` of proc_pid_status, in MiB.
fn resident_mib(process: &Child) -> anyhow::Result<f64> {
    let path = format!("/proc/{}/status", process.id());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.context("no VmRSS")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<f64>()? / 1024.0)
}

//! One agent: how long from `apply` until guests run, and what it takes while they do nothing.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_vmm::api::GuestState;
use keelson_vmm::client::VmmClient;
use keelson_vmm_tests::{GuestBuilder, payload};

use super::client::{Client, guest, runs};
use super::host::Host;
use super::memory::Memory;
use super::{AGENT, ALONE, Add};
use crate::process;

/// How many guests are applied at once.
pub const COUNTS: [usize; 3] = [1, 10, 100];
const MEMORY_MIB: u64 = 32;
const LIMIT: Duration = Duration::from_mins(2);
const POLL: Duration = Duration::from_micros(500);
/// How long a payload guest takes at most until it halts.
const REST: Duration = Duration::from_millis(300);
/// The user of a guest's jail: nobody's.
const USER: u32 = 1_900_000_002;

/// The names of work: `apply to running, N guests`.
pub fn work(count: usize, memory: Memory) -> String {
    format!("apply to running, {count} guests{}", memory.suffix())
}

/// The names of a guest's start without an agent.
pub fn own_start(memory: Memory, jailed: bool) -> String {
    let jail = if jailed { " in a jail" } else { "" };
    format!("a guest's own start{jail}{}", memory.suffix())
}

/// One round of all of it.
pub async fn measure(
    keelsond: &Path,
    root: &Path,
    idle: Duration,
    round: u32,
    add: &mut Add<'_>,
) -> anyhow::Result<()> {
    for memory in Memory::ALL {
        for jailed in [false, true] {
            alone(memory, jailed, round, add).await?;
        }
    }
    let host = Host::start(keelsond, root, None, "")?;
    let mut client = host.client();
    client.ready().await?;
    for (count, memory) in COUNTS
        .into_iter()
        .flat_map(|count| Memory::ALL.map(|memory| (count, memory)))
    {
        let names: Vec<String> = (0..count).map(|at| format!("guest-{at}")).collect();
        memory.prepare(count).await?;
        let figures = apply(&host, &mut client, &names).await?;
        add(AGENT, &work(count, memory), round, &figures);
        if (count, memory) == (COUNTS[COUNTS.len() - 1], Memory::AtHand) {
            let figures = idle_figures(host.agent(), idle).await?;
            add(AGENT, "100 idle guests", round, &figures);
        }
        delete(&mut client, &names).await?;
    }
    Ok(())
}

/// Applies guests and waits until they run.
async fn apply(
    host: &Host,
    client: &mut Client,
    names: &[String],
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let size = format!("{MEMORY_MIB}Mi");
    let objects: Vec<_> = names
        .iter()
        .map(|name| guest(name, &size, payload(), "hang"))
        .collect();
    let cpu = process::usage(std::slice::from_ref(host.agent()))?.cpu_seconds;
    let begun = Instant::now();
    client.apply(&objects).await?;
    let accepted = begun.elapsed();
    client.wait_for(names, LIMIT, runs).await?;
    let took = begun.elapsed();
    let guests = process::processor_time(&host.guests());
    let cpu = process::usage(std::slice::from_ref(host.agent()))?.cpu_seconds - cpu;
    Ok(BTreeMap::from([
        ("ms", took.as_secs_f64() * 1e3),
        ("accepted_ms", accepted.as_secs_f64() * 1e3),
        ("agent_cpu_ms", cpu * 1e3),
        ("guests_cpu_ms", guests.as_secs_f64() * 1e3),
    ]))
}

async fn delete(client: &mut Client, names: &[String]) -> anyhow::Result<()> {
    // No payload guest obeys its power button here: `stopTimeout` would pass for each.
    client.kill(names).await?;
    client.delete(names).await?;
    client.wait_for(names, LIMIT, |guest| guest.is_none()).await
}

/// How long a guest takes by itself: keelson-vmm, from when it is started until its processor runs.
async fn alone(memory: Memory, jailed: bool, round: u32, add: &mut Add<'_>) -> anyhow::Result<()> {
    for _ in 0..3 {
        memory.prepare(1).await?;
        let builder = GuestBuilder::new("hang").set("/memory/size_mib", MEMORY_MIB);
        let builder = if jailed { in_jail(builder)? } else { builder };
        let begun = Instant::now();
        let guest = builder.start();
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
        // What its processor does then, until it halts, is done while others start.
        std::thread::sleep(REST);
        let id = guest.process_id();
        let mut processes = process::children(id);
        processes.push(id);
        let cpu = process::processor_time(&processes).as_secs_f64() * 1e3;
        let figures = BTreeMap::from([("ms", took), ("cpu_ms_until_rest", cpu)]);
        add(ALONE, &own_start(memory, jailed), round, &figures);
        guest.client().kill()?;
        guest.wait();
    }
    Ok(())
}

/// The guest as an agent has it: under a user of its own, who owns the folder of its log.
fn in_jail(builder: GuestBuilder) -> anyhow::Result<GuestBuilder> {
    let folder = builder.directory();
    let log = folder.join("log");
    std::fs::create_dir(&log)?;
    chown(&log, Some(USER), Some(USER))?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    let log = log.join("console.log").display().to_string();
    let builder = builder.set("/console/log", log);
    Ok(builder
        .argument("--jail")
        .argument(&format!("{USER}:{USER}")))
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

//! keelson-vmm on this machine's KVM with the payload guest.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_vmm::api::{AfterSnapshot, GuestState, SnapshotKind, SnapshotRequest, SnapshotTaken};
use keelson_vmm::client::VmmClient;
use keelson_vmm_tests::{Guest, GuestBuilder};

use super::Peer;
use crate::report::Sample;

const POLL: Duration = Duration::from_micros(200);
const PATIENCE: Duration = Duration::from_mins(1);
const MEMORY_MIB: u64 = 256;

/// Measures all of it, some rounds.
pub fn measure(rounds: u32) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for round in 1..=rounds {
        let mut add = |work: &str, figures: &[(&'static str, f64)]| {
            samples.push(Sample {
                peer: Peer::Keelson.name(),
                work: work.to_owned(),
                round,
                figures: figures.iter().copied().collect::<BTreeMap<_, _>>(),
            });
        };
        boot(&mut add)?;
        snapshots(&mut add)?;
    }
    Ok(samples)
}

type Add<'a> = dyn FnMut(&str, &[(&'static str, f64)]) + 'a;

fn builder(steps: &str) -> GuestBuilder {
    GuestBuilder::new(steps).set("/memory/size_mib", MEMORY_MIB)
}

fn boot(add: &mut Add<'_>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let guest = builder("exits:count=20000 hang").start();
    let mut client = connect(&guest)?;
    client.status()?;
    add(
        "API ready",
        &[("cpu_ms", cpu_ms(guest.process_id())?), ("ms", ms(begun))],
    );
    line(&guest, "payload: start us=")?;
    add("start to the payload's first line", &[("ms", ms(begun))]);
    let exits = line(&guest, "payload: exits ok")?;
    let us = number(&exits, "us=")?;
    add(
        "exits, payload guest",
        &[("exits_per_s", number(&exits, "count=")? / us * 1e6)],
    );
    line(&guest, "payload: hang ok")?;
    add(
        "booted",
        &[("memory_mib", overhead_mib(guest.process_id())?)],
    );
    client.kill()?;
    guest.wait();
    Ok(())
}

fn snapshots(add: &mut Add<'_>) -> anyhow::Result<()> {
    let place = tempfile::tempdir()?;
    let guest = builder("remember:mib=64 wait-generation hang").start();
    line(&guest, "payload: remember ready")?;
    let take = |name: &str, kind| -> anyhow::Result<(SnapshotTaken, Instant)> {
        let begun = Instant::now();
        let taken = guest.client().snapshot(SnapshotRequest {
            directory: place.path().join(name),
            kind,
            then: AfterSnapshot::Resume,
        })?;
        Ok((taken, begun))
    };
    let (full, begun) = take("first", SnapshotKind::Full)?;
    add(
        "full snapshot, 64 MiB used",
        &[("paused_ms", paused_ms(&full)), ("ms", ms(begun))],
    );
    guest.type_line("next");
    line(&guest, "payload: remember round=1")?;
    let (difference, begun) = take("difference", SnapshotKind::Differential)?;
    add(
        "differential snapshot, 4 MiB changed",
        &[("paused_ms", paused_ms(&difference)), ("ms", ms(begun))],
    );
    guest.type_line("done");
    line(&guest, "payload: wait-generation ready")?;
    take("full", SnapshotKind::Full)?;
    guest.client().kill()?;
    guest.wait();

    let begun = Instant::now();
    let clone = builder("hello")
        .restore(&place.path().join("full"), &[])
        .start();
    line(&clone, "payload: wait-generation ok")?;
    let runs = ms(begun);
    line(&clone, "payload: hang ok")?;
    let memory = overhead_mib(clone.process_id())?;
    add("clone of 256 MiB", &[("ms", runs), ("memory_mib", memory)]);
    anyhow::ensure!(
        connect(&clone)?.status()?.state == GuestState::Running,
        "the clone ended"
    );
    clone.client().kill()?;
    clone.wait();
    Ok(())
}

fn connect(guest: &Guest) -> anyhow::Result<VmmClient> {
    let path = guest.api_socket();
    until("the API", || VmmClient::connect(&path).ok())
}

/// Waits for a whole line of the console that begins so.
fn line(guest: &Guest, start: &str) -> anyhow::Result<String> {
    until(start, || {
        let log = guest.log();
        let lines = log
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        lines
            .into_iter()
            .find(|line| line.starts_with(start))
            .map(str::to_owned)
    })
}

fn until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        anyhow::ensure!(begun.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
        std::thread::sleep(POLL);
    }
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

fn paused_ms(taken: &SnapshotTaken) -> f64 {
    Duration::from_micros(taken.paused_us).as_secs_f64() * 1e3
}

fn number(line: &str, name: &str) -> anyhow::Result<f64> {
    let rest = line
        .split(name)
        .nth(1)
        .with_context(|| format!("no {name} in {line:?}"))?;
    let digits = rest
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap_or_default();
    Ok(digits.parse()?)
}

/// CPU time of all threads but the vCPUs' (proc_pid_schedstat: nanoseconds on the processor first).
fn cpu_ms(process: u32) -> anyhow::Result<f64> {
    let mut sum = 0.0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?.path();
        let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
        if read("comm").starts_with("vcpu") {
            continue;
        }
        let statistics = read("schedstat");
        let nanoseconds = statistics.split_whitespace().next().unwrap_or("0");
        sum += nanoseconds.parse::<f64>()? / 1e6;
    }
    Ok(sum)
}

/// Resident memory of all mappings but the guest's (proc_pid_smaps), which is known by its size, in MiB.
fn overhead_mib(process: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{process}/smaps");
    let smaps = fs::read_to_string(Path::new(&path)).with_context(|| format!("read {path}"))?;
    let kib = |value: &str| value.trim().trim_end_matches(" kB").parse::<u64>();
    let (mut resident, mut is_guest) = (0, false);
    for line in smaps.lines() {
        if let Some(size) = line.strip_prefix("Size:") {
            is_guest = kib(size)? == MEMORY_MIB << 10;
        } else if let Some(rss) = line.strip_prefix("Rss:")
            && !is_guest
        {
            resident += kib(rss)?;
        }
    }
    let resident = u32::try_from(resident).context("more than any VMM has")?;
    Ok(f64::from(resident) / 1024.0)
}

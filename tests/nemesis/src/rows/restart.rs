use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::statvfs;
use tokio::time::sleep;

use super::Notes;
use super::data::Data;
use super::process::{Peak, own, resident};
use crate::admin;
use crate::cluster::{Cluster, Setup};
use crate::program::Program;

/// Bytes of a value.
const VALUE: usize = 4096;

/// One member with values of 4 KiB, so many gigabytes of them, is killed and starts again. What its
/// kernel has cached of its files stays there.
pub async fn make(
    folder: &Path,
    setup: Setup,
    gigabytes: u64,
    notes: &mut Notes,
) -> anyhow::Result<()> {
    ensure_room(folder, gigabytes)?;
    let setup = Setup {
        members: 1,
        disk_mib: 3 * 1024 * gigabytes + 2048,
        flags: match setup.program {
            // It refuses more than 2 GiB otherwise.
            Program::Etcd => vec![format!("--quota-backend-bytes={}", (3 * gigabytes) << 30)],
            Program::KeelsonState => Vec::new(),
        },
        ..setup
    };
    let mut cluster = Cluster::start(folder, setup).await?;
    let url = Cluster::client_url(0);
    let data = Data {
        keys: gigabytes * 1_000_000_000 / VALUE as u64,
        bytes: VALUE,
    };
    let begin = Instant::now();
    data.load_singly(&url).await?;
    notes.note("data, GB", gigabytes);
    notes.seconds("loaded in, s", begin.elapsed());
    sleep(Duration::from_secs(2)).await;
    let process = cluster.process(0).unwrap_or(0);
    notes.mebibytes("memory before, MiB", resident(process));
    notes.mebibytes("of that not of a mapped file, MiB", own(process));
    cluster.kill(0)?;
    let begin = Instant::now();
    cluster.run(0)?;
    let process = cluster.process(0).unwrap_or(0);
    let peak = Peak::of(process);
    while !admin::answers(&url).await {
        ensure!(
            begin.elapsed() < Duration::from_mins(10),
            "it does not answer within 10 minutes"
        );
        sleep(Duration::from_millis(20)).await;
    }
    notes.seconds("answers after, s", begin.elapsed());
    notes.mebibytes("memory then, MiB", resident(process));
    sleep(Duration::from_secs(3)).await;
    notes.mebibytes("memory at most, MiB", peak.bytes());
    notes.mebibytes("not of a mapped file after the restart, MiB", own(process));
    let found = data.look_at_some(&url, 1000).await?;
    notes.note("lost or wrong, of 1000 keys", found.missing + found.wrong);
    Ok(())
}

/// Data and log: less than half as much again as the data for both programs.
fn ensure_room(folder: &Path, gigabytes: u64) -> anyhow::Result<()> {
    let room = statvfs(folder).context("ask how much room there is")?;
    let (free, needed) = (
        room.f_bavail * room.f_frsize,
        1_500_000_000 * gigabytes + 1_000_000_000,
    );
    ensure!(
        free >= needed,
        "{} has {} GB of room, this row needs {}: set TMPDIR to where there is more",
        folder.display(),
        free / 1_000_000_000,
        needed / 1_000_000_000
    );
    Ok(())
}

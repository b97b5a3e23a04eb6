use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::data::Data;
use super::process::{Peak, resident};
use super::{Notes, RowFlags};
use crate::admin;
use crate::cluster::{Cluster, Setup};
use crate::program::Program;

/// One member with values of 4 KiB, so many gigabytes of them, is killed and starts again.
pub async fn make(folder: &Path, flags: &RowFlags, notes: &mut Notes) -> anyhow::Result<()> {
    let setup = Setup {
        members: 1,
        disk_mib: 3 * 1024 * flags.gigabytes + 2048,
        flags: match flags.program {
            // It refuses more than 2 GiB otherwise.
            Program::Etcd => vec![format!(
                "--quota-backend-bytes={}",
                (3 * flags.gigabytes) << 30
            )],
            Program::KeelsonState => Vec::new(),
        },
        ..Setup::of(flags.program, flags.seed)
    };
    let mut cluster = Cluster::start(folder, setup).await?;
    let url = Cluster::client_url(0);
    let data = Data {
        keys: flags.gigabytes * 1_000_000_000 / 4096,
        bytes: 4096,
    };
    let begin = Instant::now();
    data.load_singly(&url).await?;
    notes.note("data, GB", flags.gigabytes);
    notes.seconds("loaded in, s", begin.elapsed());
    sleep(Duration::from_secs(2)).await;
    notes.mebibytes(
        "memory before, MiB",
        resident(cluster.process(0).unwrap_or(0)),
    );
    cluster.kill(0)?;
    let begin = Instant::now();
    cluster.run(0)?;
    let process = cluster.process(0).unwrap_or(0);
    let peak = Peak::of(process);
    while !admin::answers(&url).await {
        anyhow::ensure!(
            begin.elapsed() < Duration::from_mins(10),
            "it does not answer within 10 minutes"
        );
        sleep(Duration::from_millis(20)).await;
    }
    notes.seconds("answers after, s", begin.elapsed());
    notes.mebibytes("memory then, MiB", resident(process));
    sleep(Duration::from_secs(3)).await;
    notes.mebibytes("memory at most, MiB", peak.bytes());
    Ok(())
}

//! A run: clients at work on a cluster, one fault after the other, then the verdict.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum as _};
use keelson_checker::{Limits, Report, Verdict, check};
use tokio::time::{Instant, sleep};

use crate::admin;
use crate::cluster::{Cluster, Setup, name};
use crate::faults::{Fault, Kind};
use crate::program::Program;
use crate::record::Record;
use crate::workload::{Ending, Load, Workload};

/// What a run is made of.
#[derive(Debug, Clone, Args)]
pub struct RunFlags {
    /// What the members are.
    #[arg(long, value_enum, default_value = "keelson-state")]
    pub program: Program,
    /// How long faults go on.
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// What everything is drawn from. Processes and their clocks are real: the same seed gives the same
    /// requests and faults, not the same run.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Which faults there are, comma-separated [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub faults: Vec<Kind>,
    /// Clients that read and write.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub clients: u32,
    /// Operations a second, of all clients.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Where to keep the history and the members' logs, of a run that failed.
    #[arg(long, default_value = "nemesis-failures")]
    pub keep: PathBuf,
}

/// What came of a run.
pub struct Outcome {
    /// The checker's report.
    pub report: Report,
    /// In a line.
    pub summary: String,
    /// How many operations were done, were refused, failed, and are unknown.
    pub operations: [usize; 4],
    /// Watches and leases that were checked.
    pub watches_and_leases: [usize; 2],
    /// How often there was which fault.
    pub faults: BTreeMap<Kind, usize>,
    /// The longest time in which no write was acknowledged.
    pub longest_gap: Duration,
}

/// Runs, prints what happens, and says whether all went well.
pub async fn run(folder: &Path, flags: &RunFlags) -> anyhow::Result<Outcome> {
    let record = Arc::new(Record::new());
    let outcome = break_and_check(folder, flags, &record).await;
    if !outcome.as_ref().is_ok_and(|outcome| outcome.report.holds()) {
        match keep(folder, flags, &record) {
            Ok(kept) => println!("kept in {}", kept.display()),
            Err(error) => println!("nothing could be kept: {error:#}"),
        }
    }
    outcome
}

async fn break_and_check(
    folder: &Path,
    flags: &RunFlags,
    record: &Arc<Record>,
) -> anyhow::Result<Outcome> {
    let mut cluster = Cluster::start(folder, Setup::of(flags.program, flags.seed)).await?;
    let load = Load {
        clients: flags.clients,
        rate: flags.rate,
        leases: 3,
    };
    let mut workload = Workload::start(record, &cluster.client_urls(), load, flags.seed);
    let end = Instant::now() + Duration::from_secs(flags.seconds);
    let faults = break_until(&mut cluster, flags, record, end).await?;
    cluster.heal()?;
    cluster
        .wait_for_all(Duration::from_secs(90))
        .await
        .context("after the last fault")?;
    workload.stop_writing(record).await;
    let ending = Ending {
        revision: record.last_revision(),
        until: Instant::now() + Duration::from_secs(30),
    };
    workload.stop_watching(ending).await;
    let agreement = agree(&mut cluster).await?;
    let gap = Duration::from_nanos(record.longest_gap());
    drop(cluster);
    let history = record.history();
    let began = Instant::now();
    let mut report = check(&history, &Limits::default());
    report.verdicts.push(("members agree", agreement));
    let operations = record.counts();
    let [done, refused, failed, unknown] = operations;
    let summary = format!(
        "{} seed {}: {} faults; {done} operations done, {refused} refused, {failed} failed, \
         {unknown} unknown; {} watches, {} leases; longest time without a write {gap:.1?}; checked in {:.1?}",
        flags.program.name(),
        flags.seed,
        faults.values().sum::<usize>(),
        history.watches.len(),
        history.leases.len(),
        began.elapsed(),
    );
    Ok(Outcome {
        report,
        summary,
        operations,
        watches_and_leases: [history.watches.len(), history.leases.len()],
        faults,
        longest_gap: gap,
    })
}

/// One fault after the other: how often there was which.
async fn break_until(
    cluster: &mut Cluster,
    flags: &RunFlags,
    record: &Record,
    end: Instant,
) -> anyhow::Result<BTreeMap<Kind, usize>> {
    let mut random = fastrand::Rng::with_seed(flags.seed ^ 0xfau64);
    let kinds = if flags.faults.is_empty() {
        Kind::value_variants()
    } else {
        &flags.faults
    };
    let mut faults = BTreeMap::new();
    let say = |what: &str| {
        println!(
            "{:6.1} s  {what}",
            Duration::from_nanos(record.now()).as_secs_f64()
        );
    };
    watch_over(cluster, Duration::from_secs(1), &say).await?;
    while Instant::now() < end {
        // Now and then, a second one at the same time.
        for _ in 0..=u32::from(random.u32(..4) == 0) {
            let Some(fault) = Fault::draw(cluster, kinds, &mut random).await else {
                continue;
            };
            say(&fault.to_string());
            fault.begin(cluster).await?;
            watch_over(cluster, fault.time, &say).await?;
            *faults.entry(fault.kind).or_default() += 1;
        }
        cluster.heal()?;
        watch_over(cluster, Duration::from_millis(random.u64(500..3000)), &say).await?;
    }
    Ok(faults)
}

async fn watch_over(
    cluster: &mut Cluster,
    time: Duration,
    say: &impl Fn(&str),
) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        for (at, how) in cluster.supervise()? {
            say(&format!(
                "{} ended by itself ({how}) and is started again",
                name(at)
            ));
        }
        sleep(Duration::from_millis(200).min(time)).await;
    }
    Ok(())
}

/// Whether all members hold the same.
async fn agree(cluster: &mut Cluster) -> anyhow::Result<Verdict> {
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        cluster.supervise()?;
        let mut hashes = Vec::new();
        for url in cluster.client_urls() {
            hashes.push(admin::hash(&url, 0).await.ok());
        }
        let first = hashes.first().copied().flatten();
        if first.is_some() && hashes.iter().all(|hash| *hash == first) {
            return Ok(Verdict::Holds);
        }
        if Instant::now() > limit {
            let violation = keelson_checker::Violation {
                what: "the members hold different things".to_owned(),
                excerpt: vec![format!("hash, compacted at, of revision: {hashes:?}")],
            };
            return Ok(Verdict::Broken(violation));
        }
        sleep(Duration::from_millis(500)).await;
    }
}

fn keep(folder: &Path, flags: &RunFlags, record: &Record) -> anyhow::Result<PathBuf> {
    let kept = flags
        .keep
        .join(format!("{}-{}", flags.program.name(), flags.seed));
    std::fs::create_dir_all(&kept)?;
    let history = std::fs::File::create(kept.join("history.json"))?;
    serde_json::to_writer(std::io::BufWriter::new(history), &record.history())?;
    for file in std::fs::read_dir(folder)?.flatten() {
        if file
            .path()
            .extension()
            .is_some_and(|extension| extension == "log")
        {
            std::fs::copy(file.path(), kept.join(file.file_name()))?;
        }
    }
    Ok(kept)
}

//! Damage to the files of one member, and how it fares with it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::Serialize;
use tokio::time::sleep;

use super::Notes;
use super::data::{Data, Found};
use crate::admin;
use crate::cluster::{Cluster, Setup, name};
use crate::program::Program;
use crate::sandbox::run;

/// The member that is damaged.
const MEMBER: usize = 1;
/// How long it has to show what it makes of it.
const LIMIT: Duration = Duration::from_mins(1);
/// One that has ended so often without an answer won't give any.
const ENDS: usize = 5;

/// Words in lines that say why something is wrong.
const SAYS_WHY: [&str; 5] = ["ERROR", "WARN", "panic", "fatal", "\"error\""];

/// One damage.
pub struct Damage {
    /// Below the member's data folder.
    pub file: PathBuf,
    /// Whether the member runs meanwhile, or is killed before and started afterwards.
    pub live: bool,
    /// In words.
    pub what: String,
    /// What is done to the file.
    pub how: How,
}

/// What is done to a file.
#[derive(Debug, Clone)]
pub enum How {
    /// This bit of this byte is another.
    Flip(u64, u8),
    /// So many bytes from here on are zero.
    Zero(u64, u64),
    /// It ends here.
    Cut(u64),
    /// These bytes are here.
    Write(u64, Vec<u8>),
}

/// How a member fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Everything is right, and its hash is that of the others.
    Right,
    /// Everything is right, but its hash differs from the others'.
    Differs,
    /// It does not start, or ends again and again.
    Ends,
    /// It runs and does not answer.
    Silent,
    /// It goes on without something that was acknowledged.
    Lacks,
    /// It answered with a value that nobody wrote.
    ServesWrong,
}

/// A cluster with data, and what its members had on disk before any damage.
pub struct Bench {
    cluster: Cluster,
    data: Data,
    pristine: PathBuf,
}

impl Bench {
    /// Makes one.
    pub async fn new(folder: &Path, setup: Setup) -> anyhow::Result<Self> {
        let mut cluster = Cluster::start(folder, setup).await?;
        let data = Data {
            keys: 5000,
            bytes: 4096,
        };
        data.load(&Cluster::client_url(0)).await?;
        sleep(Duration::from_secs(3)).await;
        let pristine = folder.join("pristine");
        std::fs::create_dir(&pristine)?;
        // What all of them would have if they were killed at once.
        for at in 0..cluster.count() {
            cluster.pause(at)?;
        }
        for at in 0..cluster.count() {
            copy(&cluster.disk(at).data(), &pristine.join(name(at)))?;
        }
        for at in 0..cluster.count() {
            cluster.resume(at)?;
        }
        Ok(Self {
            cluster,
            data,
            pristine,
        })
    }

    /// The files of the member that hold anything, with what they hold.
    pub fn files(&self) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
        let mut files = Vec::new();
        let pristine = self.pristine.join(name(MEMBER));
        let mut folders = vec![pristine.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                    continue;
                }
                let content = std::fs::read(entry.path())?;
                if content.iter().any(|byte| *byte != 0) {
                    files.push((entry.path().strip_prefix(&pristine)?.to_owned(), content));
                }
            }
        }
        files.sort();
        Ok(files)
    }

    /// What the next write adds to `file`, of which `content` is what it had before: the first half, up
    /// to a sector's end, and where. Nobody is told of that write in the state that damages begin from,
    /// so it is what a loss of power in the middle of it leaves. Must come before any damage.
    pub async fn half_of_a_write(
        &mut self,
        file: &Path,
        content: &[u8],
    ) -> anyhow::Result<(u64, Vec<u8>)> {
        const SECTOR: usize = 512;
        let one_more = Data {
            keys: 1,
            bytes: 100_000,
        };
        one_more.load(&Cluster::client_url(MEMBER)).await?;
        for at in 0..self.cluster.count() {
            self.cluster.kill(at)?;
        }
        let after = std::fs::read(self.cluster.disk(MEMBER).data().join(file))?;
        let differs = |at: usize| after.get(at) != content.get(at);
        let (Some(from), Some(last)) = (
            (0..after.len()).find(|at| differs(*at)),
            (0..after.len()).rev().find(|at| differs(*at)),
        ) else {
            bail!("a write left {} as it was", file.display());
        };
        let end = from.midpoint(last) / SECTOR * SECTOR;
        let half = after.get(from..end).context("a write of no length")?;
        Ok((u64::try_from(from)?, half.to_vec()))
    }

    /// Makes all members what they were before any damage: one alone would have forgotten what it
    /// promised to the others.
    async fn restore(&mut self) -> anyhow::Result<()> {
        for at in 0..self.cluster.count() {
            self.cluster.kill(at)?;
        }
        for at in 0..self.cluster.count() {
            self.cluster.disk(at).wipe()?;
            copy(&self.pristine.join(name(at)), &self.cluster.disk(at).data())?;
            self.cluster.run(at)?;
        }
        self.cluster.wait_for_all(Duration::from_mins(2)).await
    }

    /// Damages the member, and notes how it and the cluster fare.
    pub async fn damage(&mut self, damage: &Damage, notes: &mut Notes) -> anyhow::Result<()> {
        self.restore().await?;
        let file = self.cluster.disk(MEMBER).data().join(&damage.file);
        if !damage.live {
            self.cluster.kill(MEMBER)?;
        }
        // While it runs, it may have given the file up.
        let done = damage.how.apply(&file);
        if damage.live && done.is_err() {
            return Ok(());
        }
        done?;
        if !damage.live {
            self.cluster.run(MEMBER)?;
        }
        let begin = Instant::now();
        let (fate, ended) = self.watch().await?;
        let time = begin.elapsed();
        let others = self.others_answer().await;
        let when = if damage.live {
            "while it runs"
        } else {
            "while it is down"
        };
        let fate_name = serde_json::to_value(fate)?;
        let ended = match ended {
            0 => String::new(),
            times => format!(", ended {times} times"),
        };
        let others = if others {
            ""
        } else {
            ", and the other members refuse requests"
        };
        let fate_name = fate_name.as_str().unwrap_or_default();
        let says = format!(
            "{fate_name} after {:.1} s{ended}{others}",
            time.as_secs_f64()
        );
        notes.note(
            &format!("{} {} {when}", damage.file.display(), damage.what),
            says,
        );
        if matches!(fate, Fate::Ends | Fate::Silent) {
            println!("    its last words: {}", self.last_words());
        }
        *notes.fates.entry(fate).or_default() += 1;
        Ok(())
    }

    /// The worst that is seen until all is right, or time is over; and how often the member ended.
    async fn watch(&mut self) -> anyhow::Result<(Fate, usize)> {
        let end = Instant::now() + LIMIT;
        let url = Cluster::client_url(MEMBER);
        let mut ended = 0;
        let mut last = Fate::Silent;
        while Instant::now() < end && (last != Fate::Ends || ended < ENDS) {
            ended += self.cluster.supervise()?.len();
            let looked = self.data.look(&url).await;
            last = match looked {
                Ok(Found { wrong: 1.., .. }) => return Ok((Fate::ServesWrong, ended)),
                Ok(Found { missing: 1.., .. }) => Fate::Lacks,
                Ok(_) if self.agrees().await => return Ok((Fate::Right, ended)),
                Ok(_) => Fate::Differs,
                Err(_) if ended > 0 => Fate::Ends,
                Err(_) => Fate::Silent,
            };
            sleep(Duration::from_millis(300)).await;
        }
        Ok((last, ended))
    }

    fn last_words(&self) -> String {
        let log = std::fs::read(self.cluster.log(MEMBER)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let said = log
            .lines()
            .rev()
            .find(|line| SAYS_WHY.iter().any(|word| line.contains(word)));
        said.unwrap_or_default().chars().take(400).collect()
    }

    async fn agrees(&self) -> bool {
        let mut hashes = Vec::new();
        for url in self.cluster.client_urls() {
            hashes.push(admin::hash(&url, 0).await.ok());
        }
        hashes.first().is_some_and(Option::is_some) && hashes.iter().all(|hash| *hash == hashes[0])
    }

    async fn others_answer(&self) -> bool {
        for at in (0..self.cluster.count()).filter(|at| *at != MEMBER) {
            if !admin::writes(&Cluster::client_url(at)).await {
                return false;
            }
        }
        true
    }
}

impl How {
    fn apply(&self, file: &Path) -> anyhow::Result<()> {
        let open = File::options().read(true).write(true).open(file);
        let open = open.with_context(|| format!("open {} to damage it", file.display()))?;
        match self {
            Self::Flip(at, bit) => {
                let mut byte = [0];
                open.read_exact_at(&mut byte, *at)?;
                byte[0] ^= 1 << (bit % 8);
                open.write_all_at(&byte, *at)?;
            }
            Self::Zero(at, length) => {
                let length = open.metadata()?.len().saturating_sub(*at).min(*length);
                open.write_all_at(&vec![0; usize::try_from(length)?], *at)?;
            }
            Self::Cut(at) => open.set_len(*at)?,
            Self::Write(at, bytes) => open.write_all_at(bytes, *at)?,
        }
        open.sync_all()?;
        Ok(())
    }
}

/// How many damages ended how.
pub type Fates = BTreeMap<Fate, usize>;

/// Whether a file is one of the log's.
pub fn is_log(program: Program, file: &Path) -> bool {
    let folder = match program {
        Program::KeelsonState => "log",
        Program::Etcd => "wal",
    };
    file.components()
        .any(|part| part.as_os_str().to_string_lossy().starts_with(folder))
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    run("cp", &["--archive", "--sparse=always", &from, &to])
}

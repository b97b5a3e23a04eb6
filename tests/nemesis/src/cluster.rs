use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use keelson_etcd_api::etcdserverpb as pb;
use rustix::process::{Pid, Signal, kill_process};

use crate::admin;
use crate::disk::Disk;
use crate::network::Network;
use crate::program::Program;

/// How a cluster is made.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What its members are.
    pub program: Program,
    /// How many.
    pub members: usize,
    /// MiB of each member's disk.
    pub disk_mib: u64,
    /// Flags beside the usual ones.
    pub flags: Vec<String>,
    /// What the network's chances are drawn from.
    pub seed: u64,
}

/// A cluster of real processes, each on a host and a disk of its own. Members are numbered from 0.
pub struct Cluster {
    setup: Setup,
    folder: PathBuf,
    /// Between the hosts. Member `n` is on host `n + 1`.
    pub network: Network,
    members: Vec<Member>,
}

struct Member {
    disk: Disk,
    process: Option<Child>,
    paused: bool,
    /// It is to be started again if it ends by itself, as systemd would.
    wanted: bool,
    joining: bool,
}

impl Setup {
    /// Three members, with disks that are large enough for a run.
    pub fn of(program: Program, seed: u64) -> Self {
        Self {
            program,
            members: 3,
            disk_mib: 768,
            flags: Vec::new(),
            seed,
        }
    }
}

impl Cluster {
    /// Makes a cluster in `folder` and waits until each member answers.
    pub async fn start(folder: &Path, setup: Setup) -> anyhow::Result<Self> {
        let members = (0..setup.members).map(|at| {
            Ok(Member {
                disk: Disk::new(folder, &name(at), setup.disk_mib)?,
                process: None,
                paused: false,
                wanted: true,
                joining: false,
            })
        });
        let mut cluster = Self {
            members: members.collect::<anyhow::Result<_>>()?,
            network: Network::new(setup.members, setup.seed)?,
            setup,
            folder: folder.to_owned(),
        };
        for at in 0..cluster.count() {
            cluster.run(at)?;
        }
        cluster.wait_for_all(Duration::from_mins(1)).await?;
        Ok(cluster)
    }

    /// How many members it has.
    pub fn count(&self) -> usize {
        self.setup.members
    }

    /// Where clients reach a member.
    pub fn client_url(at: usize) -> String {
        format!("http://{}:2379", Network::address(at + 1))
    }

    /// Where members reach a member.
    pub fn peer_url(at: usize) -> String {
        format!("http://{}:2380", Network::address(at + 1))
    }

    /// Where clients reach all of them.
    pub fn client_urls(&self) -> Vec<String> {
        (0..self.count()).map(Self::client_url).collect()
    }

    /// A member's disk.
    pub fn disk(&mut self, at: usize) -> &mut Disk {
        &mut self.members[at].disk
    }

    /// Where a member logs.
    pub fn log(&self, at: usize) -> PathBuf {
        self.folder.join(format!("{}.log", name(at)))
    }

    /// Starts a member that is not running.
    pub fn run(&mut self, at: usize) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(at))?;
        let list = (0..self.count()).map(|at| format!("{}={}", name(at), Self::peer_url(at)));
        let mut command = self.setup.program.command(&self.members[at].disk.data())?;
        command
            .args(["--name", &name(at)])
            .args(["--listen-client-urls", &Self::client_url(at)])
            .args(["--advertise-client-urls", &Self::client_url(at)])
            .args(["--listen-peer-urls", &Self::peer_url(at)])
            .args(["--initial-advertise-peer-urls", &Self::peer_url(at)])
            .args(["--initial-cluster", &list.collect::<Vec<_>>().join(",")])
            .args([
                "--initial-cluster-state",
                if self.members[at].joining {
                    "existing"
                } else {
                    "new"
                },
            ])
            .args(&self.setup.flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let member = &mut self.members[at];
        member.process = Some(self.network.spawn(at + 1, command)?);
        member.paused = false;
        member.wanted = true;
        Ok(())
    }

    /// Kills a member as a crash would; it stays down.
    pub fn kill(&mut self, at: usize) -> anyhow::Result<()> {
        let member = &mut self.members[at];
        member.wanted = false;
        // A process that waits for a frozen disk can't be killed.
        member.disk.thaw()?;
        if let Some(mut process) = member.process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Lets a member stand still.
    pub fn pause(&mut self, at: usize) -> anyhow::Result<()> {
        self.signal(at, Signal::STOP)?;
        self.members[at].paused = true;
        Ok(())
    }

    /// Lets it go on.
    pub fn resume(&mut self, at: usize) -> anyhow::Result<()> {
        if std::mem::take(&mut self.members[at].paused) {
            self.signal(at, Signal::CONT)?;
        }
        Ok(())
    }

    /// The process of a member that runs.
    pub fn process(&self, at: usize) -> Option<u32> {
        self.members[at].process.as_ref().map(Child::id)
    }

    /// Starts members again that ended by themselves: which, and how.
    pub fn supervise(&mut self) -> anyhow::Result<Vec<(usize, String)>> {
        let mut ended = Vec::new();
        for at in 0..self.count() {
            let member = &mut self.members[at];
            let Some(process) = member.process.as_mut().filter(|_| member.wanted) else {
                continue;
            };
            if let Some(status) = process.try_wait()? {
                ended.push((at, status.to_string()));
                self.run(at)?;
            }
        }
        Ok(ended)
    }

    /// Ends every fault.
    pub fn heal(&mut self) -> anyhow::Result<()> {
        self.network.heal();
        for at in 0..self.count() {
            self.members[at].disk.thaw()?;
            self.members[at].disk.make_room()?;
            self.resume(at)?;
            if !self.members[at].wanted {
                self.run(at)?;
            }
        }
        Ok(())
    }

    /// Waits until each member answers reads that need a leader; those that end are started again.
    pub async fn wait_for_all(&mut self, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        for at in 0..self.count() {
            while !admin::answers(&Self::client_url(at)).await {
                self.supervise()?;
                if Instant::now() > end {
                    let log = std::fs::read_to_string(self.log(at)).unwrap_or_default();
                    let tail = log.len().saturating_sub(2000);
                    bail!(
                        "{} does not answer within {limit:?}; it logged: …{}",
                        name(at),
                        log.get(tail..).unwrap_or_default()
                    );
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// The member that leads, as most say.
    pub async fn leader(&self) -> Option<usize> {
        admin::leader(&self.client_urls()).await
    }

    /// Takes a dead member's data away, and lets a new one join in its place: it is removed, added as
    /// a learner, started, and promoted when it has caught up.
    pub async fn refill(&mut self, at: usize, limit: Duration) -> anyhow::Result<()> {
        self.kill(at)?;
        self.members[at].disk.wipe()?;
        let end = Instant::now() + limit;
        let others: Vec<String> = (0..self.count())
            .filter(|other| *other != at)
            .map(Self::client_url)
            .collect();
        let peer_url = Self::peer_url(at);
        // Each step is repeated until the cluster says that it is done: an answer may be lost.
        let added = loop {
            match self.replace_in_list(&others, &peer_url).await {
                Ok(added) => break added,
                Err(error) if Instant::now() > end => {
                    return Err(error).context("replace a member");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        };
        self.members[at].joining = true;
        self.run(at)?;
        loop {
            match admin::promote(&others, added).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error).context("promote a member");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            }
            self.supervise()?;
        }
    }

    /// Brings the list of members to where the old one is out and a learner is in: its ID.
    async fn replace_in_list(&self, others: &[String], peer_url: &str) -> anyhow::Result<u64> {
        let members = admin::members(others).await?;
        let of_peer = |member: &&pb::Member| member.peer_ur_ls.iter().any(|url| url == peer_url);
        let existing = members.iter().find(of_peer);
        match existing {
            // Not started yet, so it is the one that was added.
            Some(member) if member.is_learner && member.name.is_empty() => Ok(member.id),
            Some(member) => {
                admin::remove(others, member.id).await?;
                admin::add_learner(others, peer_url).await
            }
            None => admin::add_learner(others, peer_url).await,
        }
    }

    fn signal(&self, at: usize, signal: Signal) -> anyhow::Result<()> {
        let process = self
            .process(at)
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(process) = process {
            kill_process(process, signal).context("send a signal")?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for at in 0..self.members.len() {
            // What can't be killed here is killed with the program.
            let _ = self.kill(at);
        }
    }
}

/// The name of a member.
pub fn name(at: usize) -> String {
    format!("m{}", at + 1)
}

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::cluster::{Cluster, name};
use crate::network::{CLIENTS, Link};

/// What can be done to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A member is killed (SIGKILL).
    Kill,
    /// All are.
    KillAll,
    /// A member stands still (SIGSTOP).
    Pause,
    /// A member and the others don't hear of each other; clients reach it.
    Isolate,
    /// Nor do clients reach it.
    CutOff,
    /// The others don't hear of it, but it hears of them.
    Mute,
    /// It doesn't hear of the others, but they hear of it.
    Deafen,
    /// Two members don't hear of each other; the third hears of both.
    Part,
    /// Everything is late, by times that differ.
    Delay,
    /// A share of all frames is lost.
    Lose,
    /// A member's disk is full.
    FillDisk,
    /// A member's disk does not answer.
    StallDisk,
    /// A member loses its data, and is replaced by a new one.
    Refill,
}

/// A fault on its way.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What is done.
    pub kind: Kind,
    /// To which member.
    pub target: usize,
    /// For how long.
    pub time: Duration,
    /// Whether it leads.
    leads: bool,
    link: Link,
}

impl Fault {
    /// Draws one of `kinds`.
    pub async fn draw(
        cluster: &Cluster,
        kinds: &[Kind],
        random: &mut fastrand::Rng,
    ) -> Option<Self> {
        let kind = *random.choice(kinds)?;
        let leader = cluster.leader().await;
        let target = match leader {
            Some(leader) if random.bool() => leader,
            _ => random.usize(..cluster.count()),
        };
        let link = match kind {
            Kind::Delay => Link {
                delay: Duration::from_millis(random.u64(..60)),
                jitter: Duration::from_millis(random.u64(1..200)),
                ..Link::default()
            },
            _ => Link {
                loss_permille: random.u32(20..300),
                ..Link::default()
            },
        };
        Some(Self {
            kind,
            target,
            time: Duration::from_millis(random.u64(500..5000)),
            leads: leader == Some(target),
            link,
        })
    }

    /// Does it. What lasts is ended by [`Cluster::heal`].
    pub async fn begin(&self, cluster: &mut Cluster) -> anyhow::Result<()> {
        /// For a member to be gone, come back and catch up, with everything slow.
        const REFILL: Duration = Duration::from_secs(90);
        let target = self.target;
        let host = target + 1;
        let other = (target + 1) % cluster.count() + 1;
        let cut = |is_cut: &dyn Fn(usize, usize) -> bool| {
            cluster
                .network
                .change(|from, to, link| link.cut |= is_cut(from, to));
        };
        match self.kind {
            Kind::Kill => cluster.kill(target)?,
            Kind::KillAll => (0..cluster.count()).try_for_each(|at| cluster.kill(at))?,
            Kind::Pause => cluster.pause(target)?,
            Kind::Isolate => cut(&|from, to| {
                let is_member = from != CLIENTS && to != CLIENTS;
                is_member && (from == host || to == host)
            }),
            Kind::CutOff => cut(&|from, to| from == host || to == host),
            Kind::Mute => cut(&|from, to| from == host && to != CLIENTS),
            Kind::Deafen => cut(&|from, to| to == host && from != CLIENTS),
            Kind::Part => cut(&|from, to| [(host, other), (other, host)].contains(&(from, to))),
            Kind::Delay | Kind::Lose => cluster.network.change(|_, _, link| *link = self.link),
            Kind::FillDisk => cluster.disk(target).fill()?,
            Kind::StallDisk => cluster.disk(target).freeze()?,
            Kind::Refill => {
                // It has to reach the others, and they need a quorum without it.
                cluster.heal()?;
                cluster.refill(target, REFILL).await?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let member = name(self.target);
        let who = if self.leads {
            format!("{member}, the leader")
        } else {
            member
        };
        match self.kind {
            Kind::Kill => write!(f, "kill {who}"),
            Kind::KillAll => write!(f, "kill all"),
            Kind::Pause => write!(f, "pause {who}"),
            Kind::Isolate => write!(f, "cut {who}, off from the others"),
            Kind::CutOff => write!(f, "cut {who}, off from everybody"),
            Kind::Mute => write!(f, "the others don't hear {who}"),
            Kind::Deafen => write!(f, "{who}, doesn't hear the others"),
            Kind::Part => write!(f, "{who}, and the next don't hear each other"),
            Kind::Delay => {
                write!(
                    f,
                    "delay everything by {:?} and up to {:?}",
                    self.link.delay, self.link.jitter
                )
            }
            Kind::Lose => write!(f, "lose {}‰ of all frames", self.link.loss_permille),
            Kind::FillDisk => write!(f, "fill the disk of {who}"),
            Kind::StallDisk => write!(f, "stall the disk of {who}"),
            Kind::Refill => write!(f, "replace {who}, without its data"),
        }?;
        match self.kind {
            Kind::Refill => Ok(()),
            _ => write!(f, " for {:.1} s", self.time.as_secs_f64()),
        }
    }
}

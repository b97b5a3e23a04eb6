//! Which processors the client and the backends run on.

use std::fmt;

use anyhow::Context as _;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The client's processor and the backend's ones, as hosts keep guests' vCPUs and their disks'
/// threads apart. Where the scheduler places them, some runs have both on one processor and some
/// don't, and their figures differ by a multiple.
#[derive(Debug, Clone)]
pub struct Placement(Option<Apart>);

#[derive(Debug, Clone, Copy)]
struct Apart {
    client: CpuSet,
    backend: CpuSet,
}

impl Placement {
    /// Apart, unless it isn't wanted or there is one processor only.
    pub fn new(unpinned: bool) -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(None).context("ask for the processors")?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
        if unpinned || allowed.count() < 2 {
            return Ok(Self(None));
        }
        let (mut client, mut backend) = (CpuSet::new(), allowed);
        if let Some(first) = first {
            client.set(first);
            backend.unset(first);
        }
        Ok(Self(Some(Apart { client, backend })))
    }

    /// Keeps the calling thread, and those that it starts, where the client belongs.
    pub fn place_client(&self) -> anyhow::Result<()> {
        self.0.map_or(Ok(()), |apart| place(&apart.client))
    }

    /// Runs something, and starts processes or threads in it, where the backend belongs.
    pub fn as_backend<T>(&self, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let Some(apart) = self.0 else {
            return run();
        };
        place(&apart.backend)?;
        let outcome = run();
        self.place_client()?;
        outcome
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(_) => f.write_str("one for the client, the others for the backend"),
            None => f.write_str("as the scheduler likes"),
        }
    }
}

fn place(cpus: &CpuSet) -> anyhow::Result<()> {
    sched_setaffinity(None, cpus).context("choose the processors of a thread")
}

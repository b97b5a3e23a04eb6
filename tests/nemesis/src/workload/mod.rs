//! What clients do while their cluster is being broken.

mod clients;
mod leases;
mod watchers;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::record::Record;

pub use self::watchers::Ending;

/// How much is done at once.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Clients that read and write.
    pub clients: u32,
    /// Operations a second, of all of them.
    pub rate: u32,
    /// Clients with leases.
    pub leases: u32,
}

/// Clients at work.
pub struct Workload {
    writers: JoinSet<()>,
    watchers: JoinSet<()>,
    ending: tokio::sync::watch::Sender<Option<Ending>>,
}

impl Workload {
    /// Sets clients to work on the members at `urls`.
    pub fn start(record: &Arc<Record>, urls: &[String], load: Load, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut workload = Self {
            writers: JoinSet::new(),
            watchers: JoinSet::new(),
            ending: tokio::sync::watch::Sender::new(None),
        };
        let urls: Arc<[String]> = urls.into();
        let pause = Duration::from_secs(1) * load.clients / load.rate.max(1);
        for at in 0..load.clients {
            let client = clients::Client::new(record.clone(), urls.clone(), random.fork(), pause);
            workload.writers.spawn(client.run(at as usize));
        }
        for at in 0..load.leases {
            let client = leases::Keeper::new(record.clone(), urls.clone(), random.fork());
            workload.writers.spawn(client.run(at as usize));
        }
        workload.writers.spawn(clients::compact(
            record.clone(),
            urls.clone(),
            random.fork(),
        ));
        for at in 0..urls.len() + 3 {
            let watcher = watchers::Watcher::new(
                record.clone(),
                urls.clone(),
                random.fork(),
                workload.ending.subscribe(),
            );
            workload.watchers.spawn(watcher.run(at));
        }
        workload
    }

    /// Lets those that write end what they do.
    pub async fn stop_writing(&mut self, record: &Record) {
        record.stop();
        while self.writers.join_next().await.is_some() {}
    }

    /// Lets watches get everything up to `revision`, and ends them.
    pub async fn stop_watching(&mut self, ending: Ending) {
        // Nobody listens if all have ended.
        let _ = self.ending.send(Some(ending));
        while self.watchers.join_next().await.is_some() {}
    }
}

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use crate::admin;

/// What a prober does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Writes a key.
    Put,
    /// Reads one, and sees what was acknowledged.
    Range,
}

/// A client that does the same small thing again and again, on the next member where one fails.
pub struct Prober {
    stopped: Arc<AtomicBool>,
    task: JoinHandle<Probed>,
}

/// What it saw.
#[derive(Debug, Default)]
pub struct Probed {
    /// When each success was called and answered.
    pub answered: Vec<(Instant, Instant)>,
    /// How often each error was seen.
    pub errors: BTreeMap<String, usize>,
}

impl Prober {
    /// Starts one on the members at `urls`.
    pub fn start(urls: &[String], probe: Probe) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(probe_until(stopped.clone(), urls.to_vec(), probe));
        Self { stopped, task }
    }

    /// Ends it.
    pub async fn stop(self) -> Probed {
        self.stopped.store(true, Ordering::Relaxed);
        self.task.await.unwrap_or_default()
    }
}

impl Probed {
    /// The longest time without an answer, between `from` and `to`.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let ends = self.answered.iter().map(|(_, end)| *end);
        let mut last = from;
        let mut longest = Duration::ZERO;
        for end in ends.filter(|end| (from..=to).contains(end)).chain([to]) {
            longest = longest.max(end.saturating_duration_since(last));
            last = end;
        }
        longest
    }

    /// The longest time that an answer took, of those called between `from` and `to`.
    pub fn slowest(&self, from: Instant, to: Instant) -> Duration {
        let within = self
            .answered
            .iter()
            .filter(|(call, _)| (from..=to).contains(call));
        within
            .map(|(call, end)| *end - *call)
            .max()
            .unwrap_or_default()
    }

    /// How many answers there were between `from` and `to`.
    pub fn count(&self, from: Instant, to: Instant) -> usize {
        let within = self
            .answered
            .iter()
            .filter(|(_, end)| (from..=to).contains(end));
        within.count()
    }

    /// The time that half of the answers took no longer than, of those between `from` and `to`.
    pub fn median(&self, from: Instant, to: Instant) -> Duration {
        let within = self
            .answered
            .iter()
            .filter(|(call, _)| (from..=to).contains(call));
        let mut times: Vec<Duration> = within.map(|(call, end)| *end - *call).collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

async fn probe_until(stopped: Arc<AtomicBool>, urls: Vec<String>, probe: Probe) -> Probed {
    let mut probed = Probed::default();
    let mut at = 0;
    let mut kv: Option<KvClient<Channel>> = None;
    while !stopped.load(Ordering::Relaxed) {
        let call = Instant::now();
        let mut client = kv.take();
        if client.is_none() {
            let connected = timeout(LIMIT, admin::connect(&urls[at % urls.len()])).await;
            client = connected.ok().and_then(Result::ok).map(KvClient::new);
        }
        let Some(mut client) = client else {
            at += 1;
            *probed.errors.entry("can't connect".to_owned()).or_default() += 1;
            sleep(PAUSE).await;
            continue;
        };
        match timeout(LIMIT, ask(&mut client, probe)).await {
            Ok(Ok(())) => {
                probed.answered.push((call, Instant::now()));
                kv = Some(client);
            }
            Ok(Err(error)) => {
                let text = format!("{:?}: {}", error.code(), error.message());
                *probed.errors.entry(text).or_default() += 1;
                at += 1;
            }
            Err(_) => {
                *probed
                    .errors
                    .entry(format!("no answer within {LIMIT:?}"))
                    .or_default() += 1;
                at += 1;
            }
        }
        sleep(PAUSE).await;
    }
    probed
}

/// How long a member may take before the next one is asked.
const LIMIT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

async fn ask(kv: &mut KvClient<Channel>, probe: Probe) -> Result<(), tonic::Status> {
    match probe {
        Probe::Put => {
            let put = pb::PutRequest {
                key: "probe".into(),
                value: "value".into(),
                ..pb::PutRequest::default()
            };
            kv.put(put).await?;
        }
        Probe::Range => {
            let range = pb::RangeRequest {
                key: "probe".into(),
                ..pb::RangeRequest::default()
            };
            kv.range(range).await?;
        }
    }
    Ok(())
}

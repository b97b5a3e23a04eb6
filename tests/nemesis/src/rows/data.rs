//! Data whose every value can be told from its key.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use serde::Serialize;
use tonic::transport::Channel;

use crate::admin;

/// So many keys with values of so many bytes.
#[derive(Debug, Clone, Copy)]
pub struct Data {
    /// Keys.
    pub keys: u64,
    /// Bytes of a value.
    pub bytes: usize,
}

/// How long one request is tried: a disk may be slower than what is loaded comes.
const PATIENCE: Duration = Duration::from_mins(3);

/// What a member has of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Keys with the right value.
    pub right: u64,
    /// Keys with another value: what must never be.
    pub wrong: u64,
    /// Keys that are not there.
    pub missing: u64,
}

impl Data {
    /// Puts all of it on the member at `url`, many at a time.
    pub async fn load(self, url: &str) -> anyhow::Result<()> {
        self.load_with(url, 256 << 10, 16).await
    }

    /// Puts all of it on the member at `url`, one value in each request, as most clients do. (etcd keeps
    /// the last 100,000 requests in memory: large ones would be held against it.)
    pub async fn load_singly(self, url: &str) -> anyhow::Result<()> {
        self.load_with(url, 1, 128).await
    }

    /// So many bytes in one request, so many requests at once. Says how far it is.
    async fn load_with(self, url: &str, bytes: usize, at_once: usize) -> anyhow::Result<()> {
        const CHANNELS: u64 = 4;
        const STEPS: u64 = 10;
        let mut channels = Vec::new();
        for _ in 0..CHANNELS {
            channels.push(admin::connect(url).await?);
        }
        let batch = (bytes / (self.bytes + 100)).clamp(1, 100) as u64;
        let count = self.keys.div_ceil(batch);
        let batches = (0..count)
            .zip(channels.iter().cycle())
            .map(|(number, channel)| {
                let kv = KvClient::new(channel.clone());
                let keys = number * batch..self.keys.min((number + 1) * batch);
                self.put(kv, keys)
            });
        let mut done = futures::stream::iter(batches).buffer_unordered(at_once);
        let mut loaded = 0;
        while let Some(done) = done.next().await {
            done?;
            loaded += 1;
            let step = (count / STEPS).max(1);
            if self.keys * self.bytes as u64 > 500_000_000 && loaded % step == 0 {
                println!("    {} % are loaded", 100 * loaded / count);
            }
        }
        Ok(())
    }

    async fn put(
        self,
        mut kv: KvClient<Channel>,
        keys: std::ops::Range<u64>,
    ) -> anyhow::Result<()> {
        let puts = keys.map(|number| pb::RequestOp {
            request: Some(pb::request_op::Request::RequestPut(pb::PutRequest {
                key: key(number).into(),
                value: self.value(number).into(),
                ..pb::PutRequest::default()
            })),
        });
        let txn = pb::TxnRequest {
            success: puts.collect(),
            ..pb::TxnRequest::default()
        };
        let begin = Instant::now();
        loop {
            match kv.txn(txn.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if begin.elapsed() > PATIENCE => return Err(error).context("load data"),
                // Too many requests at once, or a new leader.
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// Reads all of it from the member at `url`, as that member has it.
    pub async fn look(self, url: &str) -> anyhow::Result<Found> {
        self.look_at(url, 0).await
    }

    /// Reads the last `count` keys of it.
    pub async fn look_at_some(self, url: &str, count: u64) -> anyhow::Result<Found> {
        self.look_at(url, self.keys.saturating_sub(count)).await
    }

    async fn look_at(self, url: &str, from: u64) -> anyhow::Result<Found> {
        const PAGE: u64 = 500;
        let mut kv =
            KvClient::new(admin::connect(url).await?).max_decoding_message_size(usize::MAX);
        let mut found = Found::default();
        let mut next = from;
        while next < self.keys {
            let end = self.keys.min(next + PAGE);
            let request = pb::RangeRequest {
                key: key(next).into(),
                range_end: key(end).into(),
                serializable: true,
                ..pb::RangeRequest::default()
            };
            let limit = Duration::from_secs(10);
            let answer = tokio::time::timeout(limit, kv.range(request))
                .await??
                .into_inner();
            let kvs: std::collections::BTreeMap<_, _> =
                answer.kvs.iter().map(|kv| (&*kv.key, &*kv.value)).collect();
            let mut known = 0;
            for number in next..end {
                match kvs.get(key(number).as_bytes()) {
                    Some(value) if **value == *self.value(number).as_bytes() => found.right += 1,
                    Some(_) => found.wrong += 1,
                    None => found.missing += 1,
                }
                known += usize::from(kvs.contains_key(key(number).as_bytes()));
            }
            // Keys that nobody wrote.
            found.wrong += (kvs.len() - known) as u64;
            next = end;
        }
        Ok(found)
    }

    /// The value of a key.
    pub fn value(self, number: u64) -> String {
        let mut value = format!("value of {} ", key(number)).repeat(self.bytes / 20 + 1);
        value.truncate(self.bytes);
        value
    }
}

/// The key of a number.
pub fn key(number: u64) -> String {
    format!("data/{number:08}")
}

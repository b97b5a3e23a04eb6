//! Data whose every value can be told from its key.

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
    /// Puts all of it on the member at `url`, many values in each request.
    pub async fn load(self, url: &str) -> anyhow::Result<()> {
        /// Bytes of one request.
        const REQUEST: usize = 256 << 10;
        let batch = (REQUEST / (self.bytes + 100)).clamp(1, 100) as u64;
        self.load_by(batch, 16, url).await
    }

    /// Puts all of it on the member at `url`, one value in each request, as most clients do. (etcd keeps
    /// the last 100,000 requests in memory: large ones would be held against it.)
    pub async fn load_singly(self, url: &str) -> anyhow::Result<()> {
        self.load_by(1, 64, url).await
    }

    async fn load_by(self, batch: u64, at_once: usize, url: &str) -> anyhow::Result<()> {
        let channel = admin::connect(url).await?;
        let batches = (0..self.keys.div_ceil(batch)).map(|number| {
            let kv = KvClient::new(channel.clone());
            let keys = number * batch..self.keys.min((number + 1) * batch);
            self.put(kv, keys)
        });
        let mut done = futures::stream::iter(batches).buffer_unordered(at_once);
        while let Some(done) = done.next().await {
            done?;
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
        let mut tries = 0;
        loop {
            match kv.txn(txn.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if tries >= 50 => return Err(error).context("load data"),
                // Too many requests at once, or a new leader.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(200)).await,
            }
            tries += 1;
        }
    }

    /// Reads all of it from the member at `url`, as that member has it.
    pub async fn look(self, url: &str) -> anyhow::Result<Found> {
        const PAGE: u64 = 500;
        let mut kv =
            KvClient::new(admin::connect(url).await?).max_decoding_message_size(usize::MAX);
        let mut found = Found::default();
        let mut next = 0;
        while next < self.keys {
            let end = self.keys.min(next + PAGE);
            let request = pb::RangeRequest {
                key: key(next).into(),
                range_end: key(end).into(),
                serializable: true,
                ..pb::RangeRequest::default()
            };
            let limit = std::time::Duration::from_secs(10);
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

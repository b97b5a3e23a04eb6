//! A client of an agent.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_api::proto::objects_client::ObjectsClient;
use keelson_api::proto::virtual_machines_client::VirtualMachinesClient;
use keelson_api::proto::watch_event::Type;
use keelson_api::proto::{ApplyRequest, DeleteRequest, ListRequest, StopRequest, WatchRequest};
use serde_json::{Value, json};
use tonic::transport::Channel;

/// As many objects as go into one transaction of a state store, and some room.
const BATCH: usize = 100;
const MESSAGE_LIMIT: usize = 64 << 20;

/// A client of an agent.
#[derive(Debug, Clone)]
pub struct Client {
    objects: ObjectsClient<Channel>,
    guests: VirtualMachinesClient<Channel>,
}

impl Client {
    /// A client of the agent that listens at `socket`, connected with the first request.
    pub fn new(socket: &Path) -> Self {
        let channel = keelson_agent::connect(socket);
        Self {
            objects: ObjectsClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            guests: VirtualMachinesClient::new(channel),
        }
    }

    /// Waits until the agent answers.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let request = || ListRequest {
            kind: "Host".into(),
        };
        while let Err(status) = self.objects.list(request()).await {
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "the agent doesn't answer: {status}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Applies objects, some in each request.
    pub async fn apply(&mut self, objects: &[Value]) -> anyhow::Result<()> {
        for batch in objects.chunks(BATCH) {
            let documents = batch.iter().map(serde_json::to_vec);
            let request = ApplyRequest {
                documents: documents.collect::<Result<_, _>>()?,
                dry_run: false,
            };
            self.objects.apply(request).await.context("apply objects")?;
        }
        Ok(())
    }

    /// All objects of a kind.
    pub async fn objects(&mut self, kind: &str) -> anyhow::Result<Vec<Value>> {
        let request = ListRequest { kind: kind.into() };
        let list = self.objects.list(request).await?.into_inner();
        let objects = list.objects.iter();
        let objects = objects.map(|object| serde_json::from_slice(&object.json));
        Ok(objects.collect::<Result<_, _>>()?)
    }

    /// Ends guests at once.
    pub async fn kill(&mut self, names: &[String]) -> anyhow::Result<()> {
        for name in names {
            let request = StopRequest {
                name: name.clone(),
                force: true,
            };
            self.guests.stop(request).await.context("stop a guest")?;
        }
        Ok(())
    }

    /// Deletes guests.
    pub async fn delete(&mut self, names: &[String]) -> anyhow::Result<()> {
        for name in names {
            let request = DeleteRequest {
                kind: "VirtualMachine".into(),
                name: name.clone(),
            };
            self.objects
                .delete(request)
                .await
                .context("delete a guest")?;
        }
        Ok(())
    }

    /// Waits until each of these guests is in a state, by its object; `None` stands for one that is gone.
    pub async fn wait_for(
        &mut self,
        names: &[String],
        limit: Duration,
        reached: impl Fn(Option<&Value>) -> bool,
    ) -> anyhow::Result<()> {
        let mut left: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let request = WatchRequest {
            kind: "VirtualMachine".into(),
            name: String::new(),
        };
        let mut events = self.objects.watch(request).await?.into_inner();
        let waiting = async {
            let mut seen: BTreeSet<String> = BTreeSet::new();
            while !left.is_empty() {
                let event = events.message().await?.context("the watch ended")?;
                if event.r#type() == Type::Bookmark {
                    left.retain(|name| seen.contains(*name) || !reached(None));
                }
                let Some(object) = &event.object else {
                    continue;
                };
                let value: Option<Value> = (event.r#type() != Type::Deleted)
                    .then(|| serde_json::from_slice(&object.json))
                    .transpose()?;
                seen.insert(object.name.clone());
                if reached(value.as_ref()) {
                    left.remove(object.name.as_str());
                }
            }
            anyhow::Ok(())
        };
        let waited = tokio::time::timeout(limit, waiting).await;
        waited.with_context(|| format!("not all of {} guests within {limit:?}", names.len()))?
    }
}

/// Whether a guest runs.
pub fn runs(guest: Option<&Value>) -> bool {
    guest.is_some_and(|guest| guest["status"]["phase"] == "Running")
}

/// A guest of one processor and this much memory.
pub fn guest(name: &str, memory: &str, image: &Path, steps: &str) -> Value {
    let kernel = json!({"image": image, "commandLine": format!("console=ttyS0 -- {steps}")});
    json!({
        "apiVersion": "keelson.dev/v1alpha1",
        "kind": "VirtualMachine",
        "metadata": {"name": name},
        "spec": {"cpus": 1, "memory": memory, "kernel": kernel},
    })
}

//! The connection to the agent.

use std::path::Path;

use anyhow::Context;
use keelson_api::proto::disks_client::DisksClient;
use keelson_api::proto::events_client::EventsClient;
use keelson_api::proto::host_client::HostClient;
use keelson_api::proto::objects_client::ObjectsClient;
use keelson_api::proto::virtual_machines_client::VirtualMachinesClient;
use keelson_api::proto::{self, GetRequest, ListRequest};
use keelson_api::{Kind, Object};
use tonic::transport::Channel;

use crate::failure::Failure;

/// The largest answer, in bytes: a list of many objects.
const MESSAGE_LIMIT: usize = 64 << 20;

/// The agent's services.
#[derive(Debug)]
pub struct Client {
    pub objects: ObjectsClient<Channel>,
    pub guests: VirtualMachinesClient<Channel>,
    pub disks: DisksClient<Channel>,
    pub events: EventsClient<Channel>,
    pub host: HostClient<Channel>,
}

impl Client {
    /// A client of the agent at `socket`, connected with the first request.
    pub fn connect(socket: &Path) -> Self {
        let channel = keelson_agent::connect(socket);
        Self {
            objects: ObjectsClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            guests: VirtualMachinesClient::new(channel.clone()),
            disks: DisksClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            events: EventsClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            host: HostClient::new(channel),
        }
    }

    /// One object.
    pub async fn get(&mut self, kind: Kind, name: &str) -> Result<Object, Failure> {
        let request = GetRequest {
            kind: kind.to_string(),
            name: name.into(),
        };
        decode(&self.objects.get(request).await?.into_inner())
    }

    /// All objects of one kind.
    pub async fn list(&mut self, kind: Kind) -> Result<Vec<Object>, Failure> {
        let request = ListRequest {
            kind: kind.to_string(),
        };
        let response = self.objects.list(request).await?.into_inner();
        response.objects.iter().map(decode).collect()
    }
}

/// Reads an object that the agent sent.
pub fn decode(object: &proto::Object) -> Result<Object, Failure> {
    let value = serde_json::from_slice(&object.json).context("the agent's answer is no JSON")?;
    let read = Object::from_json(&value)
        .context("the agent's answer is no object; are agent and client of one version?")?;
    Ok(read)
}

//! `keelson describe`

use clap::Args;
use keelson_api::proto::ListEventsRequest;
use keelson_api::{Condition, Event, EventType, Kind, Object};
use serde_json::Value;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, age, line, print_lines, print_value, table};

/// How many of the newest events are shown.
const EVENTS_SHOWN: usize = 20;

/// Show one object with its conditions and events.
#[derive(Args)]
pub struct Describe {
    /// vm, disk, net, pf, sg, svc or host; long names and plurals do as well.
    kind: Kind,
    /// The object's name.
    name: String,
}

impl Describe {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let object = client.get(self.kind, &self.name).await?;
        let metadata = object.metadata();
        line(&format!("Name:        {}", metadata.name))?;
        line(&format!("Kind:        {}", object.kind()))?;
        line(&format!("UID:         {}", metadata.uid))?;
        line(&format!("Generation:  {}", metadata.generation))?;
        line(&format!("Revision:    {}", metadata.resource_version))?;
        line(&format!(
            "Age:         {}",
            age(metadata.creation_timestamp)
        ))?;
        if let Some(since) = metadata.deletion_timestamp {
            line(&format!("Deleting:    since {}", age(Some(since))))?;
        }
        let mut value = serde_json::to_value(&object)?;
        let conditions = conditions(&object);
        if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
            status.remove("conditions");
        }
        for part in ["spec", "status"] {
            let Some(content) = value.get(part).filter(|content| **content != Value::Null) else {
                continue;
            };
            if content.as_object().is_some_and(serde_json::Map::is_empty) {
                continue;
            }
            line(&format!(
                "\n{}:",
                if part == "spec" { "Spec" } else { "Status" }
            ))?;
            print_value(Format::Yaml, content)?;
        }
        line("\nConditions:")?;
        let mut rows = table(["TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"]);
        for condition in conditions {
            let since = age(Some(condition.last_transition_time));
            let status = format!("{:?}", condition.status);
            rows.add_row([
                &condition.kind,
                &status,
                &condition.reason,
                &since,
                &condition.message,
            ]);
        }
        print_lines(&rows)?;
        self.print_events(client).await
    }

    async fn print_events(&self, client: &mut Client) -> Result<(), Failure> {
        let request = ListEventsRequest {
            kind: self.kind.to_string(),
            name: self.name.clone(),
        };
        let response = client.events.list(request).await?.into_inner();
        let events = response
            .events
            .iter()
            .map(|event| serde_json::from_slice(&event.json));
        let events = events.collect::<Result<Vec<Event>, _>>()?;
        line("\nEvents:")?;
        let mut rows = table(["AGE", "TYPE", "REASON", "MESSAGE"]);
        for event in events
            .iter()
            .skip(events.len().saturating_sub(EVENTS_SHOWN))
        {
            let kind = if event.kind == EventType::Normal {
                "Normal"
            } else {
                "Warning"
            };
            let since = age(Some(event.time));
            rows.add_row([since.as_str(), kind, &event.reason, &event.message]);
        }
        print_lines(&rows)
    }
}

fn conditions(object: &Object) -> &[Condition] {
    match object {
        Object::Host(host) => &host.status.conditions,
        Object::Disk(disk) => &disk.status.conditions,
        Object::Network(network) => &network.status.conditions,
        Object::PortForward(forward) => &forward.status.conditions,
        Object::SecurityGroup(group) => &group.status.conditions,
        Object::Service(service) => &service.status.conditions,
        Object::VirtualMachine(guest) => &guest.status.conditions,
    }
}

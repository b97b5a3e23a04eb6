//! `keelson events`

use clap::Args;
use futures::TryStreamExt;
use keelson_api::proto::ListEventsRequest;
use keelson_api::{Event, EventType, Kind};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, line, print_lines, print_value, table, time};

/// Show what happened to objects.
#[derive(Args)]
pub struct Events {
    /// Only the guest of this name.
    name: Option<String>,
    /// Go on with what happens from now on.
    #[arg(short, long)]
    follow: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Events {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let kind = self.name.as_ref().map(|_| Kind::VirtualMachine.to_string());
        let request = ListEventsRequest {
            kind: kind.unwrap_or_default(),
            name: self.name.unwrap_or_default(),
        };
        if self.follow {
            let mut events = client.events.follow(request).await?.into_inner();
            while let Some(event) = events.try_next().await? {
                let event: Event = serde_json::from_slice(&event.json)?;
                match self.output {
                    Format::Table | Format::Name => line(&row(&event).join("   "))?,
                    Format::Json => line(&serde_json::to_string(&event)?)?,
                    Format::Yaml => print_value(Format::Yaml, &event)?,
                }
            }
            return Ok(());
        }
        let events = client.events.list(request).await?.into_inner().events;
        let events = events
            .iter()
            .map(|event| serde_json::from_slice(&event.json));
        let events = events.collect::<Result<Vec<Event>, _>>()?;
        if matches!(self.output, Format::Json | Format::Yaml) {
            return print_value(self.output, &events);
        }
        let mut rows = table(["TIME", "TYPE", "OBJECT", "REASON", "MESSAGE"]);
        for event in &events {
            rows.add_row(row(event));
        }
        print_lines(&rows)
    }
}

fn row(event: &Event) -> [String; 5] {
    let kind = if event.kind == EventType::Normal {
        "Normal"
    } else {
        "Warning"
    };
    [
        time(event.time),
        kind.into(),
        format!("{}/{}", event.object.kind, event.object.name),
        event.reason.clone(),
        event.message.clone(),
    ]
}

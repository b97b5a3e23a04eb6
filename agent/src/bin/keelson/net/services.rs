//! `keelson net services`

use clap::Args;
use keelson_api::proto::{PacketCounter, ServiceTraffic, ServicesRequest};
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, print_lines, print_value, table};

/// Packets and bytes between services and their clients on this host or behind it, by backend.
///
/// What has no backend is that of guests which the service no longer has, or which are too many to be counted one
/// by one.
#[derive(Args)]
pub struct Services {
    /// The service; all where not given.
    name: Option<String>,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Services {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.unwrap_or_default();
        let response = client.host.services(ServicesRequest { name }).await?;
        let traffic = response.into_inner().traffic;
        if matches!(self.output, Format::Json | Format::Yaml) {
            let traffic: Vec<_> = traffic.iter().map(to_json).collect();
            return print_value(self.output, &traffic);
        }
        let mut rows = table([
            "SERVICE",
            "ADDRESS",
            "PORT",
            "BACKEND",
            "DIRECTION",
            "PACKETS",
            "BYTES",
        ]);
        for traffic in traffic {
            for (direction, counter) in [
                ("to backend", traffic.to_backend),
                ("from backend", traffic.from_backend),
            ] {
                let counter = counter.unwrap_or_default();
                rows.add_row([
                    traffic.service.clone(),
                    traffic.address.clone(),
                    format!("{}/{}", traffic.port, traffic.protocol),
                    traffic.backend.clone(),
                    direction.into(),
                    counter.packets.to_string(),
                    counter.bytes.to_string(),
                ]);
            }
        }
        print_lines(&rows)
    }
}

fn to_json(traffic: &ServiceTraffic) -> Value {
    let count = |counter: Option<PacketCounter>| {
        let counter = counter.unwrap_or_default();
        json!({ "packets": counter.packets, "bytes": counter.bytes })
    };
    json!({
        "service": traffic.service,
        "address": traffic.address,
        "protocol": traffic.protocol,
        "port": traffic.port,
        "backend": (!traffic.backend.is_empty()).then_some(&traffic.backend),
        "toBackend": count(traffic.to_backend),
        "fromBackend": count(traffic.from_backend),
    })
}

//! `keelson net flows` and `keelson net drops`

use clap::Args;
use futures::TryStreamExt;
use jiff::Timestamp;
use keelson_api::proto::{Flow, FlowsRequest, PacketEvent, PacketsRequest};
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, line, print_lines, print_value, table, time};

/// Show a guest's flows; with --follow, those of any guest as they begin and end.
#[derive(Args)]
pub struct Flows {
    /// The guest.
    #[arg(required_unless_present = "follow")]
    name: Option<String>,
    /// Show each flow as it begins, and each TCP flow as it ends, from now on.
    #[arg(short, long)]
    follow: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Show each packet that is dropped from now on, and why.
///
/// Under a flood some are left out; `keelson net counters` counts them all.
#[derive(Args)]
pub struct Drops {
    /// Only those of this guest.
    name: Option<String>,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Flows {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.unwrap_or_default();
        if self.follow {
            let request = PacketsRequest {
                name,
                drops: false,
                flows: true,
            };
            return follow(client, request, self.output).await;
        }
        let request = FlowsRequest { name };
        let mut flows = client.guests.flows(request).await?.into_inner().flows;
        flows.sort_by_key(|flow| flow.idle_seconds);
        if matches!(self.output, Format::Json | Format::Yaml) {
            let flows: Vec<Value> = flows.iter().map(flow_json).collect();
            return print_value(self.output, &flows);
        }
        let mut rows = table([
            "INTERFACE",
            "PROTOCOL",
            "GUEST",
            "",
            "PEER",
            "STATE",
            "IDLE",
        ]);
        for flow in &flows {
            let arrow = if flow.from_guest { "->" } else { "<-" };
            rows.add_row([
                flow.interface.clone(),
                flow.protocol.clone(),
                end(&flow.address, flow.port),
                arrow.into(),
                end(&flow.peer, flow.peer_port),
                flow.state.clone(),
                format!("{}s", flow.idle_seconds),
            ]);
        }
        print_lines(&rows)
    }
}

impl Drops {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = PacketsRequest {
            name: self.name.unwrap_or_default(),
            drops: true,
            flows: false,
        };
        follow(client, request, self.output).await
    }
}

async fn follow(
    client: &mut Client,
    request: PacketsRequest,
    output: Format,
) -> Result<(), Failure> {
    let mut packets = client.guests.packets(request).await?.into_inner();
    while let Some(packet) = packets.try_next().await? {
        match output {
            Format::Table | Format::Name => line(&text(&packet))?,
            Format::Json => line(&packet_json(&packet).to_string())?,
            Format::Yaml => print_value(Format::Yaml, &packet_json(&packet))?,
        }
    }
    Ok(())
}

fn text(packet: &PacketEvent) -> String {
    let direction = if packet.from_guest { "from" } else { "to" };
    let what = if packet.reason.is_empty() {
        packet.happening.clone()
    } else {
        format!("{}: {}", packet.happening, packet.reason)
    };
    let ends = if packet.source.is_empty() {
        String::new()
    } else if is_icmp(packet) {
        format!(
            " type {} {} -> {}",
            packet.source_port, packet.source, packet.destination
        )
    } else {
        format!(
            " {} -> {}",
            end(&packet.source, packet.source_port),
            end(&packet.destination, packet.destination_port)
        )
    };
    let device = if packet.guest.is_empty() {
        packet.interface.clone()
    } else {
        format!("{}/{}", packet.guest, packet.interface)
    };
    format!(
        "{}   {direction} {device}   {what}   {}{ends}   {} bytes",
        Timestamp::from_nanosecond(packet.unix_nanoseconds.into()).map_or(String::new(), time),
        packet.protocol,
        packet.bytes
    )
}

/// Whether the source port is a type.
fn is_icmp(packet: &PacketEvent) -> bool {
    packet.protocol.starts_with("icmp")
}

/// An address with its port, if there is one.
pub fn end(address: &str, port: u32) -> String {
    match (port, address.contains(':')) {
        (0, _) => address.to_owned(),
        (port, true) => format!("[{address}]:{port}"),
        (port, false) => format!("{address}:{port}"),
    }
}

fn flow_json(flow: &Flow) -> Value {
    json!({
        "interface": flow.interface,
        "protocol": flow.protocol,
        "address": flow.address,
        "port": flow.port,
        "peer": flow.peer,
        "peerPort": flow.peer_port,
        "openedBy": if flow.from_guest { "guest" } else { "peer" },
        "state": flow.state,
        "idleSeconds": flow.idle_seconds,
    })
}

fn packet_json(packet: &PacketEvent) -> Value {
    json!({
        "unixNanoseconds": packet.unix_nanoseconds,
        "guest": packet.guest,
        "interface": packet.interface,
        "direction": if packet.from_guest { "fromGuest" } else { "toGuest" },
        "happening": packet.happening,
        "reason": packet.reason,
        "protocol": packet.protocol,
        "source": packet.source,
        "sourcePort": (!is_icmp(packet)).then_some(packet.source_port),
        "destination": packet.destination,
        "destinationPort": (!is_icmp(packet)).then_some(packet.destination_port),
        "icmpType": is_icmp(packet).then_some(packet.source_port),
        "bytes": packet.bytes,
    })
}

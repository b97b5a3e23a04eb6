//! `keelson net counters`

use clap::Args;
use keelson_api::BitRate;
use keelson_api::proto::{
    CountersRequest, DirectionCounters, PacketCounter, RateLimit, UplinksRequest,
};
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, print_lines, print_value, table};

/// Packets and bytes by interface, direction and reason; without a guest, what was translated at uplinks.
///
/// Of each rule it shows the packets that it let open a flow, or that belong to none; what follows in
/// a flow is in `passed` only. A direction that is limited shows its limit.
#[derive(Args)]
pub struct Counters {
    /// The guest; the host's uplinks where not given.
    name: Option<String>,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Counters {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let Some(name) = self.name else {
            return uplinks(client, self.output).await;
        };
        let request = CountersRequest { name };
        let interfaces = client
            .guests
            .counters(request)
            .await?
            .into_inner()
            .interfaces;
        if matches!(self.output, Format::Json | Format::Yaml) {
            let interfaces: Vec<_> = interfaces
                .iter()
                .map(|interface| {
                    json!({
                        "name": interface.name,
                        "device": interface.device,
                        "fromGuest": interface.from_guest.as_ref().map(to_json),
                        "toGuest": interface.to_guest.as_ref().map(to_json),
                    })
                })
                .collect();
            return print_value(self.output, &interfaces);
        }
        let mut rows = table([
            "INTERFACE",
            "DEVICE",
            "DIRECTION",
            "VERDICT",
            "PACKETS",
            "BYTES",
        ]);
        for interface in &interfaces {
            let directions = [
                ("from guest", &interface.from_guest),
                ("to guest", &interface.to_guest),
            ];
            for (direction, counters) in directions {
                let limits = counters
                    .iter()
                    .filter_map(|counters| counters.limit.as_ref());
                let verdicts = counters.iter().flat_map(verdicts);
                let verdicts = verdicts.map(|(verdict, packets, bytes)| {
                    (verdict, packets.to_string(), bytes.to_string())
                });
                for (verdict, packets, bytes) in verdicts.chain(limits.map(limit_row)) {
                    rows.add_row([
                        interface.name.clone(),
                        interface.device.clone(),
                        direction.into(),
                        verdict,
                        packets,
                        bytes,
                    ]);
                }
            }
        }
        print_lines(&rows)
    }
}

/// What was translated at each address of the host's uplinks. What was not is with the guests that sent it.
async fn uplinks(client: &mut Client, output: Format) -> Result<(), Failure> {
    let response = client.host.uplinks(UplinksRequest {}).await?.into_inner();
    if matches!(output, Format::Json | Format::Yaml) {
        let addresses = response.addresses.iter().map(|address| {
            let count = |counter: Option<PacketCounter>| {
                let counter = counter.unwrap_or_default();
                json!({ "packets": counter.packets, "bytes": counter.bytes })
            };
            json!({
                "device": address.device,
                "address": address.address,
                "toUplink": count(address.to_uplink),
                "fromUplink": count(address.from_uplink),
            })
        });
        return print_value(output, &addresses.collect::<Vec<_>>());
    }
    let mut rows = table(["UPLINK", "ADDRESS", "DIRECTION", "PACKETS", "BYTES"]);
    for address in response.addresses {
        for (direction, counter) in [
            ("to uplink", address.to_uplink),
            ("from uplink", address.from_uplink),
        ] {
            let counter = counter.unwrap_or_default();
            rows.add_row([
                address.device.clone(),
                address.address.clone(),
                direction.into(),
                counter.packets.to_string(),
                counter.bytes.to_string(),
            ]);
        }
    }
    print_lines(&rows)
}

/// A limit in the columns of what passed.
fn limit_row(limit: &RateLimit) -> (String, String, String) {
    let rate = |rate: u64, text: String| if rate == 0 { String::new() } else { text };
    let bits = BitRate::new(limit.bits_per_second);
    (
        format!("limit, burst {}ms", limit.burst_milliseconds),
        rate(
            limit.packets_per_second,
            format!("{}/s", limit.packets_per_second),
        ),
        rate(limit.bits_per_second, format!("{bits}bit/s")),
    )
}

fn verdicts(counters: &DirectionCounters) -> Vec<(String, u64, u64)> {
    let passed = counters.passed.unwrap_or_default();
    let mut verdicts = vec![("passed".to_owned(), passed.packets, passed.bytes)];
    for drop in &counters.dropped {
        let count = drop.count.unwrap_or_default();
        verdicts.push((
            format!("dropped: {}", drop.reason),
            count.packets,
            count.bytes,
        ));
    }
    for rule in &counters.rules {
        let count = rule.count.unwrap_or_default();
        verdicts.push((
            format!("allowed: {}", rule.rule),
            count.packets,
            count.bytes,
        ));
    }
    verdicts
}

fn to_json(counters: &DirectionCounters) -> Value {
    let passed = counters.passed.unwrap_or_default();
    let dropped: serde_json::Map<_, _> = counters
        .dropped
        .iter()
        .map(|drop| {
            let count = drop.count.unwrap_or_default();
            (
                drop.reason.clone(),
                json!({ "packets": count.packets, "bytes": count.bytes }),
            )
        })
        .collect();
    let rules: Vec<_> = counters
        .rules
        .iter()
        .map(|rule| {
            let count = rule.count.unwrap_or_default();
            json!({ "rule": rule.rule, "packets": count.packets, "bytes": count.bytes })
        })
        .collect();
    json!({
        "passed": { "packets": passed.packets, "bytes": passed.bytes },
        "dropped": dropped,
        "rules": rules,
        "limit": counters.limit.as_ref().map(|limit| json!({
            "bitsPerSecond": (limit.bits_per_second > 0).then_some(limit.bits_per_second),
            "packetsPerSecond": (limit.packets_per_second > 0).then_some(limit.packets_per_second),
            "burst": format!("{}ms", limit.burst_milliseconds),
        })),
    })
}

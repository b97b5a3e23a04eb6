//! Flows, and what happens to packets, as messages.

use std::collections::HashMap;
use std::sync::Arc;

use futures::Stream;
use jiff::Timestamp;
use keelson_api::proto::{Flow, PacketEvent, PacketsRequest};
use keelson_api::{Kind, Object};
use keelson_ebpf::{Direction, FlowPhase, Happening};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use super::status;
use crate::Agent;
use crate::host::HostNetwork;

/// By device, the guest and the interface.
type Devices = HashMap<String, (String, String)>;

/// A flow of an interface.
pub fn flow(interface: &str, flow: &keelson_ebpf::Flow) -> Flow {
    Flow {
        interface: interface.into(),
        protocol: protocol_name(flow.protocol),
        address: flow.guest.0.to_string(),
        port: flow.guest.1.into(),
        peer: flow.peer.0.to_string(),
        peer_port: flow.peer.1.into(),
        from_guest: flow.opener == Direction::FromGuest,
        state: match flow.state {
            FlowPhase::Opening => "opening",
            FlowPhase::Established => "established",
            FlowPhase::HalfClosed => "half-closed",
            FlowPhase::Closed => "closed",
        }
        .into(),
        idle_seconds: flow.idle.as_secs(),
    }
}

/// What happens to packets from now on, as far as the request wants it.
pub fn follow(
    agent: &Agent,
    request: PacketsRequest,
) -> impl Stream<Item = Result<PacketEvent, Status>> + use<> {
    let receiver = agent.network.packets();
    let state = (agent.clone(), receiver, Devices::new());
    futures::stream::try_unfold(state, move |(agent, mut receiver, mut devices)| {
        let request = request.clone();
        async move {
            loop {
                let event = match receiver.recv().await {
                    Ok(event) => event,
                    // The counters have those that were missed.
                    Err(RecvError::Lagged(_)) => continue,
                    Err(RecvError::Closed) => return Ok(None),
                };
                let wanted = match event.happening {
                    Happening::Dropped(_) => request.drops,
                    Happening::Opened | Happening::Closed => request.flows,
                };
                if !wanted {
                    continue;
                }
                if !devices.contains_key(&event.interface) {
                    devices = read_devices(&agent).await?;
                    // Not asked for again, if it is no guest's: a bridge, or the tunnel.
                    devices
                        .entry(event.interface.clone())
                        .or_insert_with(|| (String::new(), event.interface.clone()));
                }
                let (guest, interface) = &devices[&event.interface];
                if request.name.is_empty() || request.name == *guest {
                    let message = message(&event, guest, interface);
                    return Ok(Some((message, (agent, receiver, devices))));
                }
            }
        }
    })
}

async fn read_devices(agent: &Agent) -> Result<Devices, Status> {
    let world = agent.objects.world().await.map_err(status)?;
    let mut devices = Devices::new();
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        for interface in &guest.spec.interfaces {
            let (guest, interface) = (&guest.metadata.name, &interface.name);
            let device = HostNetwork::device_of(guest, interface);
            devices.insert(device, (guest.clone(), interface.clone()));
        }
    }
    Ok(devices)
}

fn message(event: &Arc<keelson_ebpf::PacketEvent>, guest: &str, interface: &str) -> PacketEvent {
    let (happening, reason) = match event.happening {
        Happening::Dropped(reason) => ("dropped", reason.as_str()),
        Happening::Opened => ("opened", ""),
        Happening::Closed => ("closed", ""),
    };
    let (source, destination) = match event.addresses {
        Some((source, destination)) => (source.to_string(), destination.to_string()),
        None => (String::new(), String::new()),
    };
    PacketEvent {
        guest: guest.into(),
        interface: interface.into(),
        unix_nanoseconds: unix_nanoseconds(event.time_ns),
        from_guest: event.direction == Direction::FromGuest,
        happening: happening.into(),
        reason: reason.into(),
        source,
        destination,
        source_port: event.ports.0.into(),
        destination_port: event.ports.1.into(),
        protocol: match event.addresses {
            Some(_) => protocol_name(event.protocol),
            None => format!("ethertype {:#06x}", event.ether_type),
        },
        bytes: event.length,
    }
}

/// A time of the monotonic clock as one since the Unix epoch.
pub fn unix_nanoseconds(monotonic: u64) -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    let age = now - i128::from(monotonic);
    i64::try_from(Timestamp::now().as_nanosecond() - age).unwrap_or(0)
}

fn protocol_name(protocol: u8) -> String {
    match protocol {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        other => other.to_string(),
    }
}

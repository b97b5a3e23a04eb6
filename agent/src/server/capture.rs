//! Captured packets as messages.

use futures::Stream;
use keelson_api::VirtualMachine;
use keelson_api::proto::{CaptureRequest, CapturedPacket};
use keelson_ebpf::{Direction, MAX_SNAP_LENGTH};
use tonic::Status;

use super::packets::unix_nanoseconds;
use super::status;
use crate::Agent;
use crate::host::HostNetwork;

/// Captures an interface's packets from now on.
pub async fn follow(
    agent: &Agent,
    guest: &VirtualMachine,
    request: CaptureRequest,
) -> Result<impl Stream<Item = Result<CapturedPacket, Status>> + use<>, Status> {
    let name = &guest.metadata.name;
    let interface = interface_of(guest, &request.interface)?;
    let length = match request.snap_length as usize {
        0 => MAX_SNAP_LENGTH,
        length if length <= MAX_SNAP_LENGTH => length,
        length => {
            return Err(Status::invalid_argument(format!(
                "the snapshot length is {length}; at most {MAX_SNAP_LENGTH} bytes are captured"
            )));
        }
    };
    let device = HostNetwork::device_of(name, interface);
    let capture = agent.network.capture(device).await.map_err(status)?;
    Ok(futures::stream::unfold(
        capture,
        move |mut capture| async move {
            let (packet, lost) = capture.next().await?;
            let message = CapturedPacket {
                unix_nanoseconds: unix_nanoseconds(packet.time_ns),
                from_guest: packet.direction == Direction::FromGuest,
                reason: packet.dropped.map_or("", |reason| reason.as_str()).into(),
                length: packet.length,
                data: packet.data[..packet.data.len().min(length)].to_vec(),
                lost,
            };
            Some((Ok(message), capture))
        },
    ))
}

/// The interface of that name; of a guest that has one only, that.
fn interface_of<'a>(guest: &'a VirtualMachine, name: &str) -> Result<&'a str, Status> {
    let guest_name = &guest.metadata.name;
    let mut names = guest.spec.interfaces.iter().map(|one| one.name.as_str());
    if !name.is_empty() {
        return names.find(|one| *one == name).ok_or_else(|| {
            Status::not_found(format!(
                "VirtualMachine/{guest_name} has no interface {name:?}"
            ))
        });
    }
    let all: Vec<&str> = names.collect();
    match all.as_slice() {
        [only] => Ok(only),
        [] => Err(Status::failed_precondition(format!(
            "VirtualMachine/{guest_name} has no interfaces"
        ))),
        several => Err(Status::invalid_argument(format!(
            "VirtualMachine/{guest_name} has several interfaces; write {guest_name}/ and one of: {}",
            several.join(", ")
        ))),
    }
}

//! Steps on a network interface.

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::net::frame::{BROADCAST, ECHO_DATA_LIMIT, Echo, Frame, Operation, Station};
use crate::net::host::Host;
use crate::virtio::net::{self, Network};

const RESOLVE_MILLISECONDS: u64 = 5000;
const PING_MILLISECONDS: u64 = 5000;

pub fn resolve(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "target"])?;
    let mut host = open(machine, arguments)?;
    let station = find_target(&mut host, arguments)?;
    say!("net-arp ok mac={}", Mac(station.mac));
    Ok(())
}

pub fn ping(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "target", "count", "size"])?;
    let count = arguments.ranged("count", 3, 1, u64::from(u16::MAX))?;
    let size = arguments.ranged("size", 56, 0, ECHO_DATA_LIMIT as u64)? as usize;
    let mut host = open(machine, arguments)?;
    let target = find_target(&mut host, arguments)?;
    let mut data = [0; ECHO_DATA_LIMIT];
    for (byte, value) in data.iter_mut().zip((0..=u8::MAX).cycle()) {
        *byte = value;
    }
    let mut fastest = u64::MAX;
    for sequence in 1..=count as u16 {
        let deadline = Deadline::after_milliseconds(PING_MILLISECONDS);
        fastest = fastest.min(host.ping(target, sequence, &data[..size], deadline)?);
    }
    say!(
        "net-ping ok count={count} size={size} fastest_us={}",
        fastest / 1000
    );
    Ok(())
}

pub fn serve(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "ms", "echoes", "tcp"])?;
    let limit = arguments.number("echoes", u64::MAX)?;
    let port = arguments.ranged("tcp", 0, 0, u64::from(u16::MAX))?;
    let mut host = open(machine, arguments)?;
    if port != 0 {
        host.listen(port as u16);
    }
    say!("net-serve ready mac={}", Mac(host.station().mac));
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 2000)?);
    let served = host.serve(deadline, limit)?;
    say!(
        "net-serve ok resolutions={} echoes={}",
        served.resolutions,
        served.echoes
    );
    Ok(())
}

/// Sends with a foreign address in every place that a host can check: the frame's source, ARP's sender,
/// and the packet's source. What isn't given is the interface's own.
pub fn spoof(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "mac", "address", "target", "count"])?;
    let address = arguments.address("address")?.ok_or(Error::BadArgument)?;
    let target = arguments.address("target")?.ok_or(Error::BadArgument)?;
    let mut network = open_device(machine, arguments)?;
    let mac = arguments.mac("mac")?.unwrap_or(network.mac());
    let sender = Station { mac, address };
    let target = Station {
        mac: BROADCAST,
        address: target,
    };
    let count = arguments.ranged("count", 1, 1, 1000)?;
    for sequence in 0..count {
        network.send(Frame::arp(Operation::Request, mac, sender, target).bytes())?;
        let echo = Echo {
            reply: false,
            identifier: 0x5f,
            sequence: sequence as u16,
            data: b"spoof",
        };
        network.send(Frame::echo(sender, target, echo).bytes())?;
    }
    say!("net-spoof ok frames={}", 2 * count);
    Ok(())
}

fn open_device(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<Network, Error> {
    Network::open(machine.device(net::KIND, arguments.number("interface", 0)?)?)
}

fn open(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<Host, Error> {
    let address = arguments.address("address")?.ok_or(Error::BadArgument)?;
    Ok(Host::new(open_device(machine, arguments)?, address))
}

fn find_target(host: &mut Host, arguments: &Arguments<'_>) -> Result<Station, Error> {
    let address = arguments.address("target")?.ok_or(Error::BadArgument)?;
    host.resolve(address, Deadline::after_milliseconds(RESOLVE_MILLISECONDS))
}

struct Mac([u8; 6]);

impl core::fmt::Display for Mac {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ":" };
            write!(formatter, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

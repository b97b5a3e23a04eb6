//! Steps on a network interface.

use super::Machine;
use super::machine::{line_waits, next_line};
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::net::frame::{
    BROADCAST, Datagram, ECHO_DATA_LIMIT, Echo, Frame, Operation, Station, Syn,
};
use crate::net::host::Host;
use crate::virtio::device::wait_for;
use crate::virtio::net::{self, Network, PAIR_LIMIT};

const RESOLVE_MILLISECONDS: u64 = 5000;
const PING_MILLISECONDS: u64 = 5000;
/// What isn't answered in this time is lost.
const LOST_MILLISECONDS: u64 = 2000;
/// Between two pings of a stream, so that a small machine gets on with other things as well.
const PAUSE_MILLISECONDS: u64 = 1;

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

/// Pings, one after the other, until a line comes on the console; counts those that nobody answered.
pub fn stream(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "target", "via", "size", "tcp", "ms"])?;
    let port = arguments.ranged("tcp", 0, 0, u64::from(u16::MAX))?;
    let size = arguments.ranged("size", 56, 0, ECHO_DATA_LIMIT as u64)? as usize;
    let limit = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let mut host = open(machine, arguments)?;
    if port != 0 {
        host.listen(port as u16);
    }
    let target = find_way(&mut host, arguments)?;
    let data = [0x5a; ECHO_DATA_LIMIT];
    let (mut sent, mut lost) = (0_u64, 0_u64);
    while !line_waits() {
        if limit.passed() {
            return Err(Error::Timeout("line on the console"));
        }
        let deadline = Deadline::after_milliseconds(LOST_MILLISECONDS);
        sent += 1;
        match host.ping(target, (sent & 0xffff) as u16, &data[..size], deadline) {
            Ok(_) => {}
            Err(Error::Timeout(_)) => lost += 1,
            Err(error) => return Err(error),
        }
        if sent == 1 {
            say!("net-stream ready lost={lost}");
        }
        let pause = Deadline::after_milliseconds(PAUSE_MILLISECONDS);
        let _line_or_time = wait_for(pause, "line", || Ok(line_waits().then_some(())));
    }
    let line = &mut [0; 64];
    next_line(line, limit)?;
    say!("net-stream ok sent={sent} lost={lost}");
    Ok(())
}

/// Opens TCP connections, each as far as that the other side grants it.
pub fn connect(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[
        "interface",
        "address",
        "target",
        "via",
        "from",
        "port",
        "count",
    ])?;
    let from = arguments.ranged("from", 20_000, 1, 40_000)? as u16;
    let port = arguments.ranged("port", 80, 1, u64::from(u16::MAX))? as u16;
    let count = arguments.ranged("count", 1, 1, 10_000)? as u16;
    let mut host = open(machine, arguments)?;
    let target = find_way(&mut host, arguments)?;
    let mut granted = 0;
    for index in 0..count {
        let syn = Syn {
            source_port: from + index,
            port,
            sequence: u32::from(index) << 12 | 0x700,
        };
        let deadline = Deadline::after_milliseconds(LOST_MILLISECONDS);
        granted += u32::from(host.connect(target, syn, deadline)?);
    }
    say!("net-connect ok asked={count} granted={granted}");
    Ok(())
}

/// Pings over each queue pair in turn, with all of them in use and then with the first alone; what the
/// device must refuse, it refuses. The TAP answers a flow on the queue that it came from.
pub fn pairs(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "target", "pairs", "rounds"])?;
    let expected = arguments.ranged("pairs", 2, 1, PAIR_LIMIT as u64)? as usize;
    let rounds = arguments.ranged("rounds", 1, 1, 10_000)?;
    let address = arguments.address("address")?.ok_or(Error::BadArgument)?;
    let device = machine.device(net::KIND, arguments.number("interface", 0)?)?;
    let mut host = Host::new(Network::open_pairs(device)?, address);
    let found = host.network().pairs();
    check("queue pairs", found == expected, found)?;
    let target = find_target(&mut host, arguments)?;
    for refused in [0, expected as u16 + 1, u16::MAX] {
        let taken = host.network().use_pairs(refused)?;
        check("refusal", !taken, refused.into())?;
    }
    let (mut sequence, mut own, mut lost) = (0, 0, 0);
    for round in 0..rounds {
        // Changed between rounds, so that queues come and go.
        let used = if round % 2 == 0 { expected } else { 1 };
        let taken = host.network().use_pairs(used as u16)?;
        check("answer", taken, used)?;
        for pair in 0..used {
            host.network().send_on(pair);
            for _ in 0..3 {
                sequence = if sequence == u16::MAX {
                    1
                } else {
                    sequence + 1
                };
                let deadline = Deadline::after_milliseconds(LOST_MILLISECONDS);
                // A clone's TAP hasn't the answer that was under way when the snapshot was taken.
                if let Err(Error::Timeout(_)) = host.ping(target, sequence, b"pairs", deadline) {
                    lost += 1;
                    let deadline = Deadline::after_milliseconds(PING_MILLISECONDS);
                    host.ping(target, sequence, b"again", deadline)?;
                }
                let came = host.network().came_on();
                check("queue in use", came < used, came)?;
                own += u64::from(came == pair);
            }
        }
        host.network().send_on(0);
    }
    say!("net-pairs ok pairs={found} pings={sequence} lost={lost} own={own}");
    Ok(())
}

fn check(what: &'static str, holds: bool, value: usize) -> Result<(), Error> {
    let value = value as u64;
    holds.then_some(()).ok_or(Error::Unexpected { what, value })
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

/// Sends numbered datagrams to whoever last sent one.
pub fn feed(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["interface", "address", "port", "pause", "ms"])?;
    let port = arguments.ranged("port", 9000, 1, u64::from(u16::MAX))? as u16;
    let pause = arguments.number("pause", 10)?;
    let limit = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let mut host = open(machine, arguments)?;
    say!("net-feed ready");
    let mut fed = None;
    let mut number = 0;
    while !limit.passed() {
        let pause = Deadline::after_milliseconds(pause);
        if let Some(from) = host.hear(port, limit.earlier(pause))? {
            fed = Some(from);
        }
        if let Some((to, asked)) = fed {
            number += 1;
            let datagram = Datagram {
                source_port: port,
                port: asked.source_port,
                number,
            };
            host.tell(to, datagram)?;
        }
    }
    say!("net-feed ok sent={number}");
    Ok(())
}

/// Asks for datagrams until the first one comes. From then on it sends nothing, and says how many have come.
pub fn hear(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[
        "interface",
        "address",
        "target",
        "from",
        "port",
        "every",
        "ms",
    ])?;
    let from = arguments.ranged("from", 9001, 1, u64::from(u16::MAX))? as u16;
    let port = arguments.ranged("port", 9000, 1, u64::from(u16::MAX))? as u16;
    let every = arguments.ranged("every", 50, 1, u64::from(u32::MAX))?;
    let limit = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let mut host = open(machine, arguments)?;
    let target = find_target(&mut host, arguments)?;
    let (mut heard, mut number) = (0_u64, 0);
    while !limit.passed() {
        if heard == 0 {
            let asking = Datagram {
                source_port: from,
                port,
                number: 0,
            };
            host.tell(target, asking)?;
        }
        let retry = Deadline::after_milliseconds(LOST_MILLISECONDS);
        let Some((_, datagram)) = host.hear(from, limit.earlier(retry))? else {
            continue;
        };
        heard += 1;
        number = datagram.number;
        if heard == 1 {
            say!("net-hear ready");
        }
        if heard.is_multiple_of(every) {
            say!("net-hear heard={heard} number={number}");
        }
    }
    say!("net-hear ok heard={heard} number={number}");
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

/// The target's address, at the Ethernet address of the router that leads there if there is one.
fn find_way(host: &mut Host, arguments: &Arguments<'_>) -> Result<Station, Error> {
    let Some(router) = arguments.address("via")? else {
        return find_target(host, arguments);
    };
    let address = arguments.address("target")?.ok_or(Error::BadArgument)?;
    let deadline = Deadline::after_milliseconds(RESOLVE_MILLISECONDS);
    let Station { mac, .. } = host.resolve(router, deadline)?;
    Ok(Station { mac, address })
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

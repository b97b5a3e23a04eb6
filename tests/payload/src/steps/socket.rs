//! Steps on a socket device.

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::virtio::socket::{Connection, KIND, Packet, ROOM, Socket, operation};

const SHUTDOWN_BOTH: u32 = 3;
const OWN_PORT: u32 = 4321;

/// Waits for a connection of the host, sends everything back that comes, and ends with the host.
pub fn serve(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["port", "ms"])?;
    let own_port = arguments.number("port", 52)? as u32;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 60_000)?);
    let mut socket = open(machine)?;
    say!("vsock-serve ready cid={}", socket.cid());
    let mut data = [0; ROOM];
    let request = loop {
        let packet = socket.receive(&mut data, deadline)?;
        match packet.operation {
            operation::REQUEST if packet.destination_port == own_port => break packet,
            operation::REQUEST => {
                let refused = Connection::between(packet.destination_port, packet.source_port);
                let reset = refused.packet(socket.cid(), operation::RESET, 0);
                socket.send(&reset, &[])?;
            }
            other => return Err(unexpected(other)),
        }
    };
    let mut connection = Connection::between(own_port, request.source_port);
    connection.note(&request, 0);
    let response = connection.packet(socket.cid(), operation::RESPONSE, 0);
    socket.send(&response, &[])?;
    say!("vsock-serve connected");
    let mut held = [0; ROOM];
    let mut length = 0;
    let mut echoed = 0_u64;
    let mut ended = false;
    while !ended || length > 0 {
        let packet = socket.receive(&mut data, deadline)?;
        connection.note(&packet, 0);
        match packet.operation {
            operation::DATA => {
                let came = packet.length as usize;
                let room = held.get_mut(length..length + came);
                room.ok_or(Error::QueueFull)?.copy_from_slice(&data[..came]);
                length += came;
            }
            operation::SHUTDOWN => ended = true,
            operation::CREDIT_UPDATE => {}
            operation::CREDIT_REQUEST => {
                let update = connection.packet(socket.cid(), operation::CREDIT_UPDATE, 0);
                socket.send(&update, &[])?;
            }
            other => return Err(unexpected(other)),
        }
        if length > 0 && connection.credit() >= length {
            connection.note(&packet, length);
            let answer = connection.packet(socket.cid(), operation::DATA, length);
            socket.send(&answer, &held[..length])?;
            connection.count_sent(length);
            echoed += length as u64;
            length = 0;
        }
    }
    end(&mut socket, connection, deadline)?;
    say!("vsock-serve ok bytes={echoed}");
    Ok(())
}

/// Connects to a port of the host, sends bytes, and compares what comes back with them.
pub fn connect(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["port", "bytes", "ms", "pause"])?;
    let total = arguments.number("bytes", 65_536)?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 60_000)?);
    let mut socket = open(machine)?;
    let mut connection = Connection::between(OWN_PORT, arguments.number("port", 1024)? as u32);
    let mut data = [0; ROOM];
    let request = connection.packet(socket.cid(), operation::REQUEST, 0);
    socket.send(&request, &[])?;
    let response = socket.receive(&mut data, deadline)?;
    if response.operation != operation::RESPONSE {
        return Err(unexpected(response.operation));
    }
    connection.note(&response, 0);
    say!("vsock-connect connected");
    let (mut sent, mut came) = (0_u64, 0_u64);
    while came < total {
        let length = (total - sent).min(ROOM as u64) as usize;
        // No more than comes back at once: this side has room for that.
        if length > 0 && connection.credit() >= length && sent == came {
            for (byte, position) in data[..length].iter_mut().zip(sent..) {
                *byte = pattern(position);
            }
            let packet = connection.packet(socket.cid(), operation::DATA, length);
            socket.send(&packet, &data[..length])?;
            connection.count_sent(length);
            sent += length as u64;
            continue;
        }
        let packet = socket.receive(&mut data, deadline)?;
        let length = packet.length as usize;
        connection.note(&packet, length);
        match packet.operation {
            operation::DATA => {
                let same = data[..length]
                    .iter()
                    .zip(came..)
                    .all(|(byte, position)| *byte == pattern(position));
                if !same {
                    return Err(Error::Unexpected {
                        what: "data after byte",
                        value: came,
                    });
                }
                came += length as u64;
            }
            operation::CREDIT_UPDATE => {}
            operation::CREDIT_REQUEST => {
                let update = connection.packet(socket.cid(), operation::CREDIT_UPDATE, 0);
                socket.send(&update, &[])?;
            }
            other => return Err(unexpected(other)),
        }
    }
    end(&mut socket, connection, deadline)?;
    say!("vsock-connect ok bytes={came}");
    Ok(())
}

/// Connects to a port where nobody listens.
pub fn refused(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["port"])?;
    let mut socket = open(machine)?;
    let connection = Connection::between(OWN_PORT, arguments.number("port", 1025)? as u32);
    let request = connection.packet(socket.cid(), operation::REQUEST, 0);
    socket.send(&request, &[])?;
    expect_reset(&mut socket)?;
    say!("vsock-refused ok");
    Ok(())
}

/// Waits until the device says that all connections are gone, as it does after a restore.
pub fn wait_reset(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const TRANSPORT_RESET: u32 = 0;
    arguments.allow(&["ms"])?;
    let mut socket = open(machine)?;
    say!("vsock-wait-reset ready");
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let event = socket.event(deadline)?;
    if event != TRANSPORT_RESET {
        return Err(Error::Unexpected {
            what: "event",
            value: u64::from(event),
        });
    }
    say!("vsock-wait-reset ok");
    Ok(())
}

/// Packets that break the rules: each is answered by a reset or by nothing, and the device goes on.
pub fn hostile(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    let mut socket = open(machine)?;
    let cid = socket.cid();
    let connection = Connection::between(OWN_PORT, 9);
    let base = connection.packet(cid, operation::DATA, 0);
    let answered = [
        base,
        Packet {
            operation: 99,
            ..base
        },
        Packet {
            kind: 7,
            operation: operation::REQUEST,
            ..base
        },
        Packet {
            operation: operation::SHUTDOWN,
            flags: u32::MAX,
            ..base
        },
    ];
    for packet in answered {
        socket.send(&packet, &[])?;
        expect_reset(&mut socket)?;
    }
    // From somebody else, to somebody else, and a reset of nothing: no answer.
    let ignored = [
        Packet {
            source_cid: cid + 1,
            ..base
        },
        Packet {
            destination_cid: 5,
            ..base
        },
        Packet {
            operation: operation::RESET,
            ..base
        },
    ];
    for packet in ignored {
        socket.send(&packet, &[])?;
    }
    socket.send(&base, &[])?;
    expect_reset(&mut socket)?;
    drop(socket);
    // A length that isn't there breaks the queue, until a reset.
    let mut socket = open(machine)?;
    let broken = socket.send(
        &Packet {
            length: 1 << 20,
            ..base
        },
        &[],
    );
    if !matches!(broken, Err(Error::Timeout(_))) {
        return Err(Error::Unexpected {
            what: "answer to a packet without its data",
            value: 0,
        });
    }
    drop(socket);
    let mut socket = open(machine)?;
    socket.send(&base, &[])?;
    expect_reset(&mut socket)?;
    say!("vsock-hostile ok");
    Ok(())
}

fn open(machine: &Machine<'_>) -> Result<Socket, Error> {
    Socket::open(machine.device(KIND, 0)?)
}

fn expect_reset(socket: &mut Socket) -> Result<(), Error> {
    let deadline = Deadline::after_milliseconds(20_000);
    let answer = socket.receive(&mut [0; ROOM], deadline)?;
    if answer.operation == operation::RESET {
        Ok(())
    } else {
        Err(unexpected(answer.operation))
    }
}

/// Ends both directions and waits until the host has.
fn end(socket: &mut Socket, connection: Connection, deadline: Deadline) -> Result<(), Error> {
    let mut shutdown = connection.packet(socket.cid(), operation::SHUTDOWN, 0);
    shutdown.flags = SHUTDOWN_BOTH;
    socket.send(&shutdown, &[])?;
    while socket.receive(&mut [0; ROOM], deadline)?.operation != operation::RESET {}
    Ok(())
}

fn pattern(position: u64) -> u8 {
    (position ^ position >> 8 ^ position >> 16) as u8
}

fn unexpected(operation: u16) -> Error {
    Error::Unexpected {
        what: "packet's operation",
        value: u64::from(operation),
    }
}

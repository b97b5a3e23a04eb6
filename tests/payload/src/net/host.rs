//! A host with one address: it resolves others by ARP, pings them, answers ARP and pings, and takes TCP
//! connections.

use super::frame::{Content, Datagram, Echo, Frame, Operation, Station, Syn, parse};
use crate::clock::{self, Deadline};
use crate::error::Error;
use crate::virtio::net::{FRAME_LIMIT, Network};

/// A request is repeated after this long.
const RETRY_MILLISECONDS: u64 = 250;

/// A host on one network device.
pub struct Host {
    network: Network,
    address: [u8; 4],
    /// The TCP port whose connections it takes, to say nothing more.
    listens: Option<u16>,
}

/// What a serving host has answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// ARP requests for its address.
    pub resolutions: u64,
    /// Echo requests to its address.
    pub echoes: u64,
}

impl Host {
    /// Gives the device's host an address.
    pub fn new(network: Network, address: [u8; 4]) -> Self {
        Self {
            network,
            address,
            listens: None,
        }
    }

    /// Takes connections to a TCP port, as far as to say so.
    pub fn listen(&mut self, port: u16) {
        self.listens = Some(port);
    }

    /// The network device, to be told about its queues.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// This host's own MAC and IPv4 address.
    pub fn station(&self) -> Station {
        Station {
            mac: self.network.mac(),
            address: self.address,
        }
    }

    /// Asks by ARP who has an address, again and again until the deadline.
    pub fn resolve(&mut self, address: [u8; 4], deadline: Deadline) -> Result<Station, Error> {
        let own = self.station();
        let target = Station {
            mac: [0; 6],
            address,
        };
        let mut bytes = [0; FRAME_LIMIT];
        while !deadline.passed() {
            let request = Frame::arp(Operation::Request, own.mac, own, target);
            self.network.send(request.bytes())?;
            let retry = deadline.earlier(Deadline::after_milliseconds(RETRY_MILLISECONDS));
            while let Some(length) = self.network.receive(&mut bytes, retry)? {
                match parse(&bytes[..length]) {
                    Content::Arp {
                        operation: Operation::Reply,
                        sender,
                        ..
                    } if sender.address == address => {
                        return Ok(sender);
                    }
                    content => self.answer(content).map(drop)?,
                }
            }
        }
        Err(Error::Timeout("answer to ARP"))
    }

    /// Sends one echo request and waits for its reply; gives the nanoseconds between them.
    pub fn ping(
        &mut self,
        target: Station,
        sequence: u16,
        data: &[u8],
        deadline: Deadline,
    ) -> Result<u64, Error> {
        const IDENTIFIER: u16 = 0x6b6c;
        let request = Echo {
            reply: false,
            identifier: IDENTIFIER,
            sequence,
            data,
        };
        let start = clock::time_stamp();
        self.network
            .send(Frame::echo(self.station(), target, request).bytes())?;
        let expected = Echo {
            reply: true,
            ..request
        };
        let mut bytes = [0; FRAME_LIMIT];
        while let Some(length) = self.network.receive(&mut bytes, deadline)? {
            match parse(&bytes[..length]) {
                Content::Echo { sender, echo, .. }
                    if sender.address == target.address && echo == expected =>
                {
                    return Ok(clock::nanoseconds(
                        clock::time_stamp().saturating_sub(start),
                    ));
                }
                content => self.answer(content).map(drop)?,
            }
        }
        Err(Error::Timeout("answer to the ping"))
    }

    /// Asks for a TCP connection, as far as to be granted it; says whether it was.
    pub fn connect(
        &mut self,
        target: Station,
        syn: Syn,
        deadline: Deadline,
    ) -> Result<bool, Error> {
        let own = self.station();
        self.network.send(Frame::syn(own, target, syn).bytes())?;
        let mut bytes = [0; FRAME_LIMIT];
        while let Some(length) = self.network.receive(&mut bytes, deadline)? {
            match parse(&bytes[..length]) {
                Content::SynAck {
                    sender, syn: said, ..
                } if sender.address == target.address && said == syn => return Ok(true),
                content => self.answer(content).map(drop)?,
            }
        }
        Ok(false)
    }

    /// Answers ARP and pings until the deadline.
    pub fn serve(&mut self, deadline: Deadline, echo_limit: u64) -> Result<Served, Error> {
        let mut served = Served::default();
        let mut bytes = [0; FRAME_LIMIT];
        while served.echoes < echo_limit {
            let Some(length) = self.network.receive(&mut bytes, deadline)? else {
                break;
            };
            match self.answer(parse(&bytes[..length]))? {
                Some(Answered::Resolution) => served.resolutions += 1,
                Some(Answered::Echo) => served.echoes += 1,
                None => {}
            }
        }
        Ok(served)
    }

    /// Sends a datagram.
    pub fn tell(&mut self, target: Station, datagram: Datagram) -> Result<(), Error> {
        let frame = Frame::datagram(self.station(), target, datagram);
        self.network.send(frame.bytes())
    }

    /// The next datagram to a port, and who sent it; `None` if none comes until the deadline.
    pub fn hear(
        &mut self,
        port: u16,
        deadline: Deadline,
    ) -> Result<Option<(Station, Datagram)>, Error> {
        let mut bytes = [0; FRAME_LIMIT];
        while let Some(length) = self.network.receive(&mut bytes, deadline)? {
            match parse(&bytes[..length]) {
                Content::Datagram {
                    sender,
                    target,
                    datagram,
                } if target == self.address && datagram.port == port => {
                    return Ok(Some((sender, datagram)));
                }
                content => self.answer(content).map(drop)?,
            }
        }
        Ok(None)
    }

    fn answer(&mut self, content: Content<'_>) -> Result<Option<Answered>, Error> {
        let own = self.station();
        match content {
            Content::Arp {
                operation: Operation::Request,
                sender,
                target,
            } if target == self.address => {
                let reply = Frame::arp(Operation::Reply, own.mac, own, sender);
                self.network.send(reply.bytes())?;
                Ok(Some(Answered::Resolution))
            }
            Content::Echo {
                sender,
                target,
                echo,
            } if target == self.address && !echo.reply => {
                let reply = Frame::echo(
                    own,
                    sender,
                    Echo {
                        reply: true,
                        ..echo
                    },
                );
                self.network.send(reply.bytes())?;
                Ok(Some(Answered::Echo))
            }
            Content::Syn {
                sender,
                target,
                syn,
            } if target == self.address && self.listens == Some(syn.port) => {
                let answer = Frame::syn_ack(own, sender, syn);
                self.network.send(answer.bytes())?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

enum Answered {
    Resolution,
    Echo,
}

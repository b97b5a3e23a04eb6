//! Which ports the host uses itself, so that guests can't have them.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use keelson_api::{PortRange, ServiceProtocol};
use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry};

use crate::AgentError;
use crate::error::Result;

/// Which ports the kernel gives to the host's own connections.
const LOCAL_PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// The ports that the host uses itself.
#[derive(Clone, Debug)]
pub struct HostPorts {
    /// Those that the kernel gives to the host's own connections.
    local: RangeInclusive<u16>,
    /// What others can connect or send to.
    listening: Vec<(ServiceProtocol, SocketAddr)>,
}

impl HostPorts {
    /// Asks the kernel.
    ///
    /// # Errors
    /// [`AgentError::Io`] where `/proc` can't be read.
    pub fn read() -> Result<Self> {
        let text = std::fs::read_to_string(LOCAL_PORT_RANGE)
            .map_err(AgentError::io(format!("read {LOCAL_PORT_RANGE}")))?;
        let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
        let (first, last) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Ok(Self {
            local: first..=last,
            listening: listening()?,
        })
    }

    /// A host that uses only these for its own connections, and listens nowhere.
    #[cfg(test)]
    pub fn only_local(local: RangeInclusive<u16>) -> Self {
        Self {
            local,
            listening: Vec::new(),
        }
    }

    /// Why ports of the host's addresses can't be guests', if so; of both protocols where none is given.
    pub fn refuse(&self, protocol: Option<ServiceProtocol>, ports: PortRange) -> Option<String> {
        self.refuse_local(ports).or_else(|| {
            let mut listening = self.listening.iter();
            let taken = listening.find(|(theirs, at)| {
                let is_meant = protocol.is_none_or(|protocol| protocol == *theirs);
                is_meant && (ports.first..=ports.last).contains(&at.port())
            });
            let (protocol, at) = taken?;
            Some(format!(
                "the host listens on {}/{protocol} ({at}); take others, or end what listens there",
                at.port()
            ))
        })
    }

    /// Why ports can't be guests' since the kernel may give them to the host's own connections.
    pub fn refuse_local(&self, ports: PortRange) -> Option<String> {
        let (first, last) = (*self.local.start(), *self.local.end());
        (ports.first <= last && first <= ports.last).then(|| {
            format!(
                "{ports} overlaps net.ipv4.ip_local_port_range, {first}-{last}, from which the host's own \
                 connections get ports; take others, or change the sysctl"
            )
        })
    }
}

fn listening() -> Result<Vec<(ServiceProtocol, SocketAddr)>> {
    let failed = |error: procfs::ProcError| {
        AgentError::io("read the host's sockets from /proc/net")(std::io::Error::other(error))
    };
    let tcp = procfs::net::tcp().map_err(failed)?.into_iter();
    // Without IPv6 there are no such files.
    let tcp = tcp.chain(procfs::net::tcp6().unwrap_or_default());
    let udp = procfs::net::udp().map_err(failed)?.into_iter();
    let udp = udp.chain(procfs::net::udp6().unwrap_or_default());
    let tcp = tcp
        .filter(|socket: &TcpNetEntry| socket.state == TcpState::Listen)
        .map(|socket| (ServiceProtocol::Tcp, socket.local_address));
    let udp = udp
        .filter(|socket: &UdpNetEntry| socket.remote_address.port() == 0)
        .map(|socket| (ServiceProtocol::Udp, socket.local_address));
    let sockets = tcp.chain(udp);
    Ok(sockets.filter(|(_, at)| !at.ip().is_loopback()).collect())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn only(port: u16) -> PortRange {
        PortRange {
            first: port,
            last: port,
        }
    }

    fn none_local() -> HostPorts {
        HostPorts {
            local: 0..=0,
            ..HostPorts::read().expect("readable")
        }
    }

    #[test]
    fn what_listens_is_found_and_what_ended_is_not() {
        let tcp = TcpListener::bind("0.0.0.0:0").expect("a port");
        let udp = UdpSocket::bind("[::]:0").expect("a port");
        let local = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = |at: std::io::Result<SocketAddr>| at.expect("an address").port();
        let (tcp_port, udp_port) = (port(tcp.local_addr()), port(udp.local_addr()));
        let ports = none_local();
        let refused = ports.refuse(Some(ServiceProtocol::Tcp), only(tcp_port));
        assert!(refused.expect("taken").contains(&tcp_port.to_string()));
        assert!(
            ports
                .refuse(Some(ServiceProtocol::Udp), only(udp_port))
                .is_some()
        );
        assert!(ports.refuse(None, only(udp_port)).is_some());
        let local_port = only(port(local.local_addr()));
        assert_eq!(ports.refuse(Some(ServiceProtocol::Tcp), local_port), None);
        drop(tcp);
        let refused = none_local().refuse(Some(ServiceProtocol::Tcp), only(tcp_port));
        assert_eq!(refused, None);
    }

    #[test]
    fn the_kernels_own_range_is_refused() {
        let ports = HostPorts::only_local(32_768..=60_999);
        for range in ["32768", "60999", "1-65535", "30000-40000"] {
            let refused = ports.refuse(None, range.parse().expect("a range"));
            assert!(refused.expect("refused").contains("32768-60999"), "{range}");
        }
        for range in ["32767", "61000-65535"] {
            assert_eq!(ports.refuse(None, range.parse().expect("a range")), None);
        }
    }
}

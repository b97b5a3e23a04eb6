//! The load: packets, a stream, requests and responses, connections.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frames::{self, End};
use super::hosts::{CLIENT, Hosts, PORT, SERVER, SERVICE};
use super::injector::Injector;
use super::nftables;
use super::packet_socket::PacketSocket;
use crate::process::thread_processor_time;

/// Flows of the packet load.
const FLOWS: u16 = 64;
/// Packets that the host receives between two looks at the time.
const PACKETS: u32 = 20_000;
/// Bytes that the stream writes at once.
const CHUNK: usize = 256 << 10;

/// Figures by name.
pub type Figures = BTreeMap<&'static str, f64>;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Small packets, one way, of established flows, which the host receives from its device.
    Packets,
    /// The same, sent by a guest's program.
    SentPackets,
    /// The same to a service, whose one backend is the server.
    ServicePackets,
    /// One TCP stream.
    Throughput,
    /// One byte there and one back, on one TCP connection.
    Requests,
    /// TCP connections with one byte there and one back.
    Connections,
}

impl Work {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Packets,
        Self::SentPackets,
        Self::ServicePackets,
        Self::Throughput,
        Self::Requests,
        Self::Connections,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::SentPackets => "packets from a socket",
            Self::ServicePackets => "packets to a service",
            Self::Throughput => "stream",
            Self::Requests => "requests",
            Self::Connections => "connections",
        }
    }

    /// Does it for `duration`.
    pub fn run(self, hosts: &mut Hosts<'_>, duration: Duration) -> anyhow::Result<Figures> {
        match self {
            Self::Packets => packets(hosts, duration, Target::Server),
            Self::SentPackets => sent_packets(hosts, duration),
            Self::ServicePackets => packets(hosts, duration, Target::Service),
            Self::Throughput => with_server(hosts, swallow, |address| stream(address, duration)),
            Self::Requests => with_server(hosts, echo, |address| requests(address, duration)),
            Self::Connections => with_server(hosts, echo, |address| connections(address, duration)),
        }
    }
}

/// Whom the packet load is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The server itself.
    Server,
    /// The service in front of it.
    Service,
}

/// The ends of a flow of the packet load, from the client to the target, which the server answers.
pub fn flow(target: Target, index: u16) -> (End, End) {
    let (first, to) = match target {
        Target::Server => (20_000, SERVER),
        Target::Service => (30_000, SERVICE),
    };
    let from = End {
        port: first + index,
        ..CLIENT
    };
    (from, End { port: PORT, ..to })
}

/// Lets the host receive small packets from the client's device as fast as one processor can.
pub fn packets(hosts: &Hosts<'_>, duration: Duration, target: Target) -> anyhow::Result<Figures> {
    let frames = establish(hosts, target)?;
    let injector = hosts.within("host", || Ok(Injector::open("hc", &frames[0], FLOWS)?))?;
    deliver(hosts, "host", duration, || injector.receive(PACKETS))
}

/// Sends small packets from the client as fast as one thread can.
fn sent_packets(hosts: &Hosts<'_>, duration: Duration) -> anyhow::Result<Figures> {
    let frames = establish(hosts, Target::Server)?;
    let socket = hosts.within("client", || Ok(PacketSocket::open("c0")?))?;
    deliver(hosts, "client", duration, || {
        let begin = Instant::now();
        socket.send(&frames)?;
        Ok(begin.elapsed())
    })
}

/// Opens the flows of the packet load: both sides have sent. What arrives after that is for nobody. The client's frames.
fn establish(hosts: &Hosts<'_>, target: Target) -> anyhow::Result<Vec<Vec<u8>>> {
    let there: Vec<_> = (0..FLOWS)
        .map(|index| flow(target, index))
        .map(|(from, to)| frames::udp(from, to))
        .collect();
    let server = End {
        port: PORT,
        ..SERVER
    };
    let back: Vec<_> = (0..FLOWS)
        .map(|index| frames::udp(server, flow(target, index).0))
        .collect();
    hosts.within("server", || ignore_datagrams("s0"))?;
    hosts.within("client", || ignore_datagrams("c0"))?;
    hosts.within("client", || Ok(PacketSocket::open("c0")?.send(&there)?))?;
    hosts.within("server", || Ok(PacketSocket::open("s0")?.send(&back)?))?;
    Ok(there)
}

/// Does `send`, which tells how long it sent, over and over on a thread of a namespace; what arrived at the server's device, and what that cost.
fn deliver(
    hosts: &Hosts<'_>,
    namespace: &str,
    duration: Duration,
    send: impl Fn() -> std::io::Result<Duration> + Send + Sync,
) -> anyhow::Result<Figures> {
    let before = hosts.delivered()?;
    let softirq_before = softirq_seconds();
    let (sending, thread_seconds) = hosts.within(namespace, || {
        let begin = Instant::now();
        // What the thread did for the softirqs that it raised is in it.
        let cpu = thread_processor_time();
        let mut sending = Duration::ZERO;
        while begin.elapsed() < duration {
            sending += send()?;
        }
        let cpu = thread_processor_time().saturating_sub(cpu);
        Ok((sending, cpu.as_secs_f64()))
    })?;
    let softirq = softirq_seconds() - softirq_before;
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let delivered = (hosts.delivered()? - before) as f64;
    anyhow::ensure!(delivered > 0.0, "no packet arrived");
    Ok(BTreeMap::from([
        ("packets_per_s", delivered / sending.as_secs_f64()),
        (
            "cpu_ns_per_packet",
            (thread_seconds + softirq) * 1e9 / delivered,
        ),
    ]))
}

/// Drops the load's datagrams where they reach the guest's device, before they cost anything that
/// is not the network's.
fn ignore_datagrams(device: &str) -> anyhow::Result<()> {
    let rules = format!(
        "table netdev ignore; delete table netdev ignore; table netdev ignore {{ chain ingress {{ \
         type filter hook ingress device {device} priority 0; policy accept; \
         meta protocol ip ip protocol udp drop; }}\n }}\n"
    );
    nftables::load(&rules)
}

/// CPU time of the kernel's softirq threads in seconds.
fn softirq_seconds() -> f64 {
    let mut nanoseconds = 0.0;
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.starts_with("ksoftirqd/") {
            let schedstat = std::fs::read_to_string(entry.path().join("schedstat"));
            let schedstat = schedstat.unwrap_or_default();
            let first = schedstat.split_whitespace().next();
            nanoseconds += first.and_then(|text| text.parse().ok()).unwrap_or(0.0);
        }
    }
    nanoseconds / 1e9
}

/// Runs `client` while a thread of the server's namespace serves each connection by `serve`.
fn with_server(
    hosts: &Hosts<'_>,
    serve: impl Fn(TcpStream) + Send + Sync,
    client: impl FnOnce(std::net::SocketAddr) -> anyhow::Result<Figures> + Send,
) -> anyhow::Result<Figures> {
    let listener = hosts.within("server", || Ok(TcpListener::bind((SERVER.address, PORT))?))?;
    let address = listener.local_addr()?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            while let Ok((connection, _)) = listener.accept() {
                if done.load(Ordering::Acquire) {
                    break;
                }
                serve(connection);
            }
        });
        let figures = hosts.within("client", || client(address));
        done.store(true, Ordering::Release);
        // Wakes the server; its last connection is over.
        let woken = hosts.within("client", || Ok(TcpStream::connect(address)?));
        let _ = server.join();
        woken?;
        figures
    })
}

fn swallow(mut connection: TcpStream) {
    let mut buffer = vec![0; CHUNK];
    while connection.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

fn echo(mut connection: TcpStream) {
    let mut byte = [0];
    let _ = connection.set_nodelay(true);
    while connection.read_exact(&mut byte).is_ok() && connection.write_all(&byte).is_ok() {}
}

fn stream(address: std::net::SocketAddr, duration: Duration) -> anyhow::Result<Figures> {
    let mut connection = TcpStream::connect(address)?;
    let buffer = vec![0; CHUNK];
    let begin = Instant::now();
    let mut sent = 0.0;
    while begin.elapsed() < duration {
        #[allow(clippy::cast_precision_loss)] // far below 2^52
        let count = connection.write(&buffer)? as f64;
        sent += count;
    }
    let gigabits = sent * 8.0 / 1e9 / begin.elapsed().as_secs_f64();
    Ok(BTreeMap::from([("gigabits_per_s", gigabits)]))
}

fn requests(address: std::net::SocketAddr, duration: Duration) -> anyhow::Result<Figures> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    let mut byte = [7];
    let times = timed(duration, || {
        connection.write_all(&byte)?;
        Ok(connection.read_exact(&mut byte)?)
    })?;
    Ok(figures("transactions_per_s", times))
}

fn connections(address: std::net::SocketAddr, duration: Duration) -> anyhow::Result<Figures> {
    let mut byte = [7];
    let times = timed(duration, || {
        let mut connection = TcpStream::connect(address)?;
        connection.write_all(&byte)?;
        connection.read_exact(&mut byte)?;
        // Ends with a reset, so that ports don't wait.
        rustix::net::sockopt::set_socket_linger(&connection, Some(Duration::ZERO))?;
        Ok(())
    })?;
    Ok(figures("connections_per_s", times))
}

/// Does `once` over and over; how long each took, in microseconds.
fn timed(
    duration: Duration,
    mut once: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < duration {
        let start = Instant::now();
        once()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn figures(rate: &'static str, mut times: Vec<f64>) -> Figures {
    times.sort_by(f64::total_cmp);
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let count = times.len() as f64;
    let seconds = times.iter().sum::<f64>() / 1e6;
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(0.0);
    BTreeMap::from([
        (rate, count / seconds),
        ("p50_us", at(50)),
        ("p99_us", at(99)),
    ])
}

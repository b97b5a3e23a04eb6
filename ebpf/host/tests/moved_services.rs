//! Services whose clients and backends move to another host: the flows go on with the backends that they have.

mod network;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use keelson_ebpf::{HookChoice, InterfacePolicy, MovedFlows, Protocol, Service};
use network::PATIENCE;
use network::fleet::{ADDRESSES, SERVED, service_at};
use network::hosts::{Host, Hosts, NETWORK, Underlay, move_guest, policy};
use network::machine::{Machine, connect, talk};

with_both_hooks!(flows_go_on_when_their_client_moves);

/// More than any window, so that large segments come about.
const MUCH: usize = 1 << 20;
/// Two ports of a service that lead to the same ones of its backends.
const PORTS: [u16; 2] = [80, 81];

/// Has hosts balance over these guests.
fn serve_from(hosts: [&Host; 2], guests: &[&Machine]) {
    let mut services = Vec::new();
    for (address, port) in ADDRESSES
        .iter()
        .flat_map(|address| PORTS.map(|port| (address, port)))
    {
        let address: IpAddr = address.parse().expect("valid");
        let backends = guests.iter().map(|guest| guest.backend(address, SERVED));
        services.extend([Protocol::Tcp, Protocol::Udp].map(|protocol| Service {
            network: NETWORK,
            address,
            protocol,
            port,
            backends: backends.clone().collect(),
            draining: Vec::new(),
        }));
    }
    for host in hosts {
        let services = services.clone();
        host.run(move |inside| inside.datapath().set_services(&services).expect("valid"));
    }
}

/// A machine's flows through the service.
struct Flows {
    streams: Vec<(TcpStream, u8)>,
    /// One socket for both ports of the service, by version of IP: its port is taken when the second is asked.
    sockets: Vec<(UdpSocket, [(SocketAddr, u8); 2])>,
}

impl Flows {
    fn of(machine: &Machine) -> Self {
        machine.run(|| {
            let mut flows = Self {
                streams: Vec::new(),
                sockets: Vec::new(),
            };
            for address in ADDRESSES {
                flows
                    .streams
                    .extend((0..12).map(|_| connect(service_at(address, PORTS[0]))));
                let any = if address.contains(':') {
                    "::"
                } else {
                    "0.0.0.0"
                };
                let socket = UdpSocket::bind((any, 0)).expect("bound");
                socket.set_read_timeout(Some(PATIENCE)).expect("set");
                let asked = PORTS.map(|port| {
                    let to = service_at(address, port);
                    (to, ask(&socket, to).expect("it answers"))
                });
                flows.sockets.push((socket, asked));
            }
            flows
        })
    }

    /// Says which backends they are with.
    fn backends(&self) -> Vec<u8> {
        let streams = self.streams.iter().map(|(_, number)| *number);
        let sockets = self.sockets.iter().flat_map(|(_, asked)| asked);
        let mut backends: Vec<_> = streams.chain(sockets.map(|(_, number)| *number)).collect();
        backends.sort_unstable();
        backends.dedup();
        backends
    }

    /// Whether each of them goes on with its backend.
    fn go_on(&mut self) -> Vec<bool> {
        let mut results = Vec::new();
        for (stream, _) in &mut self.streams {
            results.push(talk(stream, 10_000).is_ok());
        }
        for (socket, asked) in &self.sockets {
            results.extend(asked.map(|(to, number)| ask(socket, to).ok() == Some(number)));
        }
        results
    }
}

/// Which backend answers in the service's name.
fn ask(socket: &UdpSocket, to: SocketAddr) -> std::io::Result<u8> {
    socket.send_to(b"who?", to)?;
    let mut heard = [0; 16];
    let (length, from) = socket.recv_from(&mut heard)?;
    assert_eq!((&heard[1..length], from), (&b"who?"[..], to));
    Ok(heard[0])
}

/// Lets all in, as guests that serve do.
fn scene(hook: HookChoice) -> (Hosts, Machine) {
    let hosts = Hosts::new(hook, Underlay::Ipv4);
    let third = hosts.one.guest(3);
    hosts.other.knows(&third, Some(&hosts.one));
    for guest in [&hosts.here, &hosts.there, &third] {
        guest.serve(SERVED);
    }
    (hosts, third)
}

/// A client of the first guest, which is a backend of the service as well. It moves when others have come for which the
/// table would have most of its flows; whether each of them goes on.
fn moves_as_client(hook: HookChoice, flows: impl Fn(MovedFlows) -> MovedFlows) -> Vec<bool> {
    let (hosts, third) = scene(hook);
    let way = [&hosts.one, &hosts.other];
    serve_from(way, &[&hosts.here, &hosts.there]);
    let mut known = Flows::of(&hosts.here);
    assert_eq!(known.backends(), [1, 2], "itself and one on the other host");
    serve_from(way, &[&third, &hosts.there, &hosts.here]);
    assert!(!known.go_on().contains(&false), "before it moves");
    let policy = policy(&hosts.here);
    let (here, taken) = move_guest(hosts.here, way, policy, flows);
    println!("{taken} flows were taken");
    here.run(move || known.go_on())
}

fn flows_go_on_when_their_client_moves(hook: HookChoice) {
    let go_on = moves_as_client(hook, |flows| {
        assert!(flows.through_services.len() > 4, "{flows:?}");
        assert_eq!(flows.translations.len(), 28);
        flows
    });
    assert_eq!(go_on, [true; 28]);
}

/// What the test above is about: by the table alone, a third of the flows would go to the third guest.
#[test]
fn without_what_services_made_of_them_some_flows_are_lost() {
    let go_on = moves_as_client(HookChoice::Auto, |flows| MovedFlows {
        translations: Vec::new(),
        ..flows
    });
    assert!(go_on.contains(&false), "{go_on:?}");
}

/// Nobody may begin anything with the client, and it only receives: what comes is translated on its new host.
#[test]
fn a_client_that_only_receives_hears_on() {
    let (hosts, _third) = scene(HookChoice::Auto);
    let way = [&hosts.one, &hosts.other];
    let closed = InterfacePolicy {
        ingress: Vec::new(),
        ..policy(&hosts.here)
    };
    hosts.one.attach(&hosts.here, closed.clone());
    hosts.there.run(|| {
        let listener = TcpListener::bind(("::", SERVED + 1)).expect("the port is free");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("it comes");
            while stream.write_all(&[1; 100]).is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    });
    for host in way {
        let address = ADDRESSES[1].parse().expect("valid");
        let backend = hosts.there.backend(address, SERVED + 1);
        host.run(move |inside| {
            let service = Service {
                network: NETWORK,
                address,
                protocol: Protocol::Tcp,
                port: 80,
                backends: vec![backend],
                draining: Vec::new(),
            };
            inside.datapath().set_services(&[service]).expect("valid");
        });
    }
    let mut stream = hosts.here.run(|| {
        let to = service_at(ADDRESSES[1], 80);
        TcpStream::connect_timeout(&to, PATIENCE).expect("it takes connections")
    });
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut heard = vec![0; 100_000];
    stream.read_exact(&mut heard).expect("it pours");
    let (here, taken) = move_guest(hosts.here, way, closed, |flows| flows);
    assert_eq!(taken, 1);
    here.run(move || stream.read_exact(&mut heard).expect("it pours on"));
}

/// Its host lacks the backend: the flow stays behind, and what it asks next goes to another one.
#[test]
fn a_flow_whose_backend_the_other_host_lacks_begins_anew() {
    let (hosts, third) = scene(HookChoice::Auto);
    let way = [&hosts.one, &hosts.other];
    serve_from(way, &[&third]);
    let mut known = Flows::of(&hosts.here);
    assert_eq!(known.backends(), [3]);
    serve_from([&hosts.other, &hosts.other], &[&hosts.there]);
    let policy = policy(&hosts.here);
    let (here, taken) = move_guest(hosts.here, way, policy, |flows| {
        assert_eq!(flows.through_services.len(), 28);
        flows
    });
    assert_eq!(taken, 0);
    let (go_on, known) = here.run(move || {
        let go_on = known.go_on();
        (go_on, known)
    });
    assert_eq!(go_on, [false; 28]);
    here.run(move || {
        for (socket, asked) in &known.sockets {
            for (to, _) in asked {
                assert_eq!(ask(socket, *to).expect("it answers"), 2);
            }
        }
    });
}

/// What is translated is at the client's host, with the backend's addresses, which it keeps: it may be on any host.
#[test]
fn flows_go_on_when_their_backend_moves() {
    let (hosts, third) = scene(HookChoice::Auto);
    let Hosts {
        one,
        other,
        here,
        there,
    } = hosts;
    serve_from([&one, &other], &[&there, &third]);
    let mut known = Flows::of(&here);
    assert_eq!(known.backends(), [2, 3]);
    let rules = policy(&there);
    // To the client's host, and away again; then the one that was there all the time goes, too.
    let (there, taken) = move_guest(there, [&other, &one], rules.clone(), |flows| flows);
    assert!(taken > 0);
    let (go_on, mut known) = here.run(move || (known.go_on(), known));
    assert_eq!(go_on, [true; 28]);
    let (_there, _) = move_guest(there, [&one, &other], rules, |flows| flows);
    let rules = policy(&third);
    let (_third, _) = move_guest(third, [&one, &other], rules, |flows| flows);
    here.run(move || {
        assert_eq!(known.go_on(), [true; 28]);
        let (stream, _) = &mut known.streams[0];
        talk(stream, MUCH).expect("it answers");
    });
}

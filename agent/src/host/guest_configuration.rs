//! Answers what guests ask about their configuration: DHCP, DHCPv6, router solicitations. Nothing is kept:
//! every answer follows from the objects, so that an agent that starts goes on where the last one was.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keelson_api::MacAddress;
use keelson_dhcp::{InterfaceConfiguration, Ipv4Configuration, Ipv6Configuration};
use keelson_ebpf::{AnswerSender, Question, QuestionReader};
use tokio::io::unix::AsyncFd;

use super::network::GuestPort;
use crate::{AgentError, error::Result};

/// How often routers tell of themselves without being asked: RFC 4861, 6.2.1 has 10 minutes at most.
const ADVERTISING: Duration = Duration::from_secs(500);
/// How often what no longer holds is taken back, and the time in between: RFC 4861, 6.2.5 and 10.
const FINAL_ADVERTISEMENTS: usize = 3;
const BETWEEN_ADVERTISEMENTS: Duration = Duration::from_secs(3);
/// Questions that are answered before others have their turn.
const BATCH: usize = 64;
/// How long the task waits after the ring buffer could not be waited for.
const RETRY: Duration = Duration::from_secs(1);

/// Answers the guests' questions, on interfaces that it was told of.
#[derive(Clone, Debug)]
pub struct GuestConfigurations {
    sender: Arc<AnswerSender>,
    ports: Arc<Mutex<BTreeMap<u32, InterfaceConfiguration>>>,
}

impl GuestConfigurations {
    /// Starts the tasks that answer and advertise; they end with the runtime.
    ///
    /// # Errors
    /// [`AgentError::Io`] where the kernel gives no socket.
    pub fn start(reader: QuestionReader) -> Result<Self> {
        let sender = AnswerSender::open()
            .map_err(AgentError::io("open a packet socket for answers to guests"))?;
        // SAFETY: the reader's descriptor is that of its map, which it owns and never gives away.
        let reader = unsafe { AsyncFd::register(reader) }
            .map_err(std::io::Error::from)
            .map_err(AgentError::io(
                "wait for what guests ask about their network",
            ))?;
        let configurations = Self {
            sender: Arc::new(sender),
            ports: Arc::default(),
        };
        tokio::spawn(configurations.clone().answer_all(reader));
        tokio::spawn(configurations.clone().advertise_all());
        Ok(configurations)
    }

    /// Answers the guest on an interface from now on, and tells it at once what it did not ask for: that what it was
    /// told before does not hold any more, and what does. What an agent before this one told is not known: one whose
    /// network has no advertisements may have had some.
    pub fn set(&self, ifindex: u32, configuration: InterfaceConfiguration) {
        let before = self.lock().get(&ifindex).cloned();
        let before = before.unwrap_or_else(|| advertised(&configuration));
        if let Some(withdrawal) = keelson_dhcp::withdrawal(&before, &configuration) {
            self.send(ifindex, &withdrawal);
            let again = self.clone();
            let holds = configuration.clone();
            tokio::spawn(async move { again.withdraw(ifindex, &withdrawal, &holds).await });
        }
        self.advertise(ifindex, &configuration);
        self.lock().insert(ifindex, configuration);
    }

    /// Sends a withdrawal again, for as long as the interface's configuration is the one that it was made for.
    async fn withdraw(&self, ifindex: u32, frame: &[u8], holds: &InterfaceConfiguration) {
        for _ in 1..FINAL_ADVERTISEMENTS {
            tokio::time::sleep(BETWEEN_ADVERTISEMENTS).await;
            if self.lock().get(&ifindex) != Some(holds) {
                return;
            }
            self.send(ifindex, frame);
        }
    }

    /// Answers nobody on an interface any more.
    pub fn remove(&self, ifindex: u32) {
        self.lock().remove(&ifindex);
    }

    async fn answer_all(self, mut reader: AsyncFd<QuestionReader>) {
        loop {
            let mut ready = match reader.readable_mut().await {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::warn!(%error, "what guests ask about their network can't be waited for");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let mut is_empty = false;
            for _ in 0..BATCH {
                let Some(question) = ready.get_inner_mut().next_question() else {
                    is_empty = true;
                    break;
                };
                self.answer(&question);
            }
            if is_empty {
                ready.clear_ready();
            }
            drop(ready);
            tokio::task::yield_now().await;
        }
    }

    fn answer(&self, question: &Question) {
        let answer = {
            let ports = self.lock();
            let configuration = ports.get(&question.ifindex);
            configuration
                .and_then(|configuration| keelson_dhcp::answer(configuration, &question.frame))
        };
        if let Some(answer) = answer {
            self.send(question.ifindex, &answer);
        }
    }

    async fn advertise_all(self) {
        loop {
            tokio::time::sleep(ADVERTISING).await;
            let ports = self.lock().clone();
            for (ifindex, configuration) in ports {
                self.advertise(ifindex, &configuration);
            }
        }
    }

    fn advertise(&self, ifindex: u32, configuration: &InterfaceConfiguration) {
        if let Some(advertisement) = keelson_dhcp::advertisement(configuration) {
            self.send(ifindex, &advertisement);
        }
    }

    /// What can't be sent is lost, as any packet may be: guests ask again.
    fn send(&self, ifindex: u32, frame: &[u8]) {
        if let Err(error) = self.sender.send(ifindex, frame) {
            tracing::debug!(ifindex, %error, "an answer to a guest was lost");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, InterfaceConfiguration>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The configuration as it may have been with advertisements.
fn advertised(configuration: &InterfaceConfiguration) -> InterfaceConfiguration {
    let mut before = configuration.clone();
    if let Some(ipv6) = &mut before.ipv6 {
        ipv6.advertised = true;
    }
    before
}

/// What the guest behind a port is told.
pub fn of_port(port: &GuestPort, router_mac: MacAddress) -> InterfaceConfiguration {
    let spec = &port.network_spec;
    InterfaceConfiguration {
        mac: port.mac.0,
        router_mac: router_mac.0,
        host_name: port.guest.clone(),
        mtu: spec.mtu,
        dns_servers: spec.dns.servers.clone(),
        search_domains: spec.dns.search_domains.clone(),
        lease_time: spec.lease_time.duration(),
        default_route: spec.default_route,
        ipv4: ipv4_of(port),
        ipv6: ipv6_of(port, router_mac.link_local()),
    }
}

fn ipv4_of(port: &GuestPort) -> Option<Ipv4Configuration> {
    let spec = &port.network_spec;
    let gateway = spec.gateway()?;
    let routes = spec.routes.iter();
    let routes = routes.filter_map(|route| match (route.destination, route.via) {
        (IpNet::V4(destination), Some(IpAddr::V4(via))) => Some((destination, via)),
        (IpNet::V4(destination), _) => Some((destination, gateway)),
        (IpNet::V6(_), _) => None,
    });
    Some(Ipv4Configuration {
        address: Ipv4Net::new(port.address?, spec.subnet?.prefix_len()).ok()?,
        router: gateway,
        routes: routes.collect(),
        dhcp: spec.dhcp,
    })
}

fn ipv6_of(port: &GuestPort, gateway: Ipv6Addr) -> Option<Ipv6Configuration> {
    let spec = &port.network_spec;
    let routes = spec.routes.iter();
    let routes = routes.filter_map(|route| match route.destination {
        IpNet::V6(destination) => Some(destination),
        IpNet::V4(_) => None,
    });
    Some(Ipv6Configuration {
        address: Ipv6Net::new(port.address_v6?, spec.subnet_v6?.prefix_len()).ok()?,
        router: gateway,
        routes: routes.collect(),
        dhcp: spec.dhcp,
        advertised: spec.router_advertisements,
        slaac: spec.slaac,
    })
}

//! What `keelson net trace` says of a service: to whom a connection may go, and why to nobody else.

use std::net::IpAddr;

use keelson_api::{Health, Protocol, Service, ServicePort, ServiceProtocol};

/// A service's port that a connection is for.
pub struct ToService<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    /// Whether it comes by IPv6.
    is_ipv6: bool,
}

/// The service that has the address, or the name.
pub fn find<'a>(services: &'a [Service], text: &str, ipv6: bool) -> Option<(&'a Service, IpAddr)> {
    let address_of = |service: &Service, ipv6: bool| {
        if ipv6 {
            service.spec.address_v6.map(IpAddr::from)
        } else {
            service.spec.address.map(IpAddr::from)
        }
    };
    if let Ok(address) = text.parse::<IpAddr>() {
        let mut services = services.iter();
        let has = |service: &&Service| address_of(service, address.is_ipv6()) == Some(address);
        return services.find(has).map(|service| (service, address));
    }
    let mut services = services.iter();
    let service = services.find(|service| service.metadata.name == text)?;
    address_of(service, ipv6).map(|address| (service, address))
}

impl<'a> ToService<'a> {
    /// The service's port that a connection with this protocol and port is for.
    ///
    /// # Errors
    /// Why there is none.
    pub fn new(
        service: &'a Service,
        address: IpAddr,
        protocol: Protocol,
        number: u16,
    ) -> Result<Self, String> {
        let name = &service.metadata.name;
        let mut ports = service.spec.ports.iter();
        let port = ports.find(|port| {
            let own = match port.protocol {
                ServiceProtocol::Tcp => Protocol::Tcp,
                ServiceProtocol::Udp => Protocol::Udp,
            };
            own == protocol && port.port == number
        });
        let port = port.ok_or_else(|| {
            let ports = service.spec.ports.iter().map(ToString::to_string);
            let ports = ports.collect::<Vec<_>>().join(", ");
            format!("dropped, since Service/{name} has {ports} only (no-service)")
        })?;
        Ok(Self {
            service,
            port,
            is_ipv6: address.is_ipv6(),
        })
    }

    /// The names of the guests that a connection may go to.
    ///
    /// # Errors
    /// Why there are none.
    pub fn serving(&self) -> Result<Vec<&'a str>, String> {
        let name = &self.service.metadata.name;
        let backends = &self.service.status.backends;
        let healthy = backends.iter().filter(|b| b.health == Health::Healthy);
        let healthy: Vec<_> = healthy.map(|backend| backend.guest.as_str()).collect();
        if healthy.is_empty() {
            let reasons = backends.iter();
            let reasons = reasons.map(|b| format!("{} is {}: {}", b.guest, b.health, b.message));
            let reasons = reasons.collect::<Vec<_>>().join("; ");
            return Err(format!(
                "dropped, since no guest serves Service/{name} (no-backend): {}",
                if reasons.is_empty() {
                    "none is selected"
                } else {
                    &reasons
                }
            ));
        }
        Ok(healthy)
    }

    /// What is decided, for people.
    pub fn describe(&self) -> String {
        let name = &self.service.metadata.name;
        let healthy = self.service.status.backends.iter();
        let healthy = healthy.filter(|b| b.health == Health::Healthy).count();
        let version = if self.is_ipv6 { "IPv6" } else { "IPv4" };
        format!(
            "Service/{name} {}: goes to port {} of one of {healthy} guests by {version}, by the hash of \
             its ends; a connection that exists stays with its guest",
            self.port,
            self.port.target()
        )
    }

    /// The port of the guests.
    pub fn target(&self) -> u16 {
        self.port.target()
    }
}

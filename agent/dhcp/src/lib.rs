//! What a guest asks about its configuration, and the answers: DHCP (RFC 2131), DHCPv6 (RFC 8415) and
//! router advertisements (RFC 4861).
//!
//! There are no leases to keep: a guest's address is in its object, and the same question always has the
//! same answer. [`answer`] is a function of an interface's configuration and a frame, without I/O, time
//! or state. Whoever calls it knows which interface a frame came from, by other means than what the frame
//! says.

mod configuration;
mod dhcpv4;
mod dhcpv6;
mod dhcpv6_question;
mod frame;
mod router;

pub use configuration::{InterfaceConfiguration, Ipv4Configuration, Ipv6Configuration};

/// The answer to a frame of the guest whose interface is so configured, as a frame; `None` if it asks
/// nothing that has an answer, or isn't well-formed.
pub fn answer(configuration: &InterfaceConfiguration, question: &[u8]) -> Option<Vec<u8>> {
    match frame::read(question)? {
        frame::Question::Dhcp { message } => dhcpv4::answer(configuration, message),
        frame::Question::Dhcpv6 { client, message } => {
            dhcpv6::answer(configuration, client, message)
        }
        frame::Question::RouterSolicitation { sender } => {
            router::advertisement(configuration, sender)
        }
    }
}

/// A router advertisement that nobody asked for, as a frame; `None` if the network has none. Routers send
/// one every few minutes, so that what they told before lasts (RFC 4861, 6.2.4).
pub fn advertisement(configuration: &InterfaceConfiguration) -> Option<Vec<u8>> {
    router::advertisement(configuration, None)
}

/// The advertisement that takes back, for a guest whose interface was configured as `before`, what it was told by
/// earlier ones and does not hold any more, as a frame; `None` if there is no such thing. It may get lost: send it a few
/// times, before any other one.
pub fn withdrawal(
    before: &InterfaceConfiguration,
    now: &InterfaceConfiguration,
) -> Option<Vec<u8>> {
    router::withdrawal(before, now)
}

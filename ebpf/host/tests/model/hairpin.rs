//! What guests send to the uplink's address: as if it had left by the uplink and come back.

use keelson_ebpf::DropReason;

use super::packet;
use super::uplink::{Uplink, source};

/// What becomes of a packet that a guest sends to the host.
pub enum Turned {
    /// It is the host's.
    ToHost,
    /// It goes to the guest with this place.
    To(usize, Vec<u8>),
    /// It is dropped, for this reason.
    Dropped(DropReason),
}

impl Uplink {
    /// What becomes of a frame that a guest sends to the host: one to a port that a guest has of the uplink's address
    /// becomes what it would outside and back.
    pub fn turn(&mut self, frame: &[u8], after: Option<&[u8]>) -> Turned {
        let Some(source) = source(frame) else {
            return Turned::ToHost;
        };
        let known = self.is_translated(source) || self.has_forward(source);
        let Ok(packet) = packet::read(frame) else {
            return Turned::ToHost;
        };
        if !known || packet.destination != self.external(source) {
            return Turned::ToHost;
        }
        let is_later = packet.fragment.is_some_and(|fragment| fragment.offset != 0);
        let mut is_error = false;
        if !is_later {
            // An echo is the host's to answer, and so is what can't be read.
            match packet.transport(frame) {
                Ok(transport) if transport.is_error => is_error = true,
                Ok(_) if matches!(packet.protocol, 6 | 17) => {}
                _ => return Turned::ToHost,
            }
        }
        // Whose it is, before any port is given for it.
        let Some((arrived, noted)) = self.back(frame) else {
            return Turned::ToHost;
        };
        let own = packet::read(&arrived)
            .expect("it was one before")
            .destination;
        if !self.is_translated(own) && !self.has_forward(own) {
            return Turned::ToHost;
        }
        let sent = match self.send_of_guest(frame, source, after) {
            Ok(sent) if sent != frame => sent,
            Err(reason) if !is_error => return Turned::Dropped(reason),
            _ => return Turned::ToHost,
        };
        self.fragments.extend(noted);
        let mut guests = self.guests.iter();
        let guest = guests.position(|guest| guest.addresses.contains(&own));
        // One changes the packet's source, the other its destination.
        let ways = frame.iter().zip(sent).zip(arrived);
        let turned = ways.map(|((was, sent), arrived)| if sent == *was { arrived } else { sent });
        Turned::To(guest.expect("it is a guest's"), turned.collect())
    }
}

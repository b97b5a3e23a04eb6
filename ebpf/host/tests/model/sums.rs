//! Checksums of translated frames: whatever a packet's sums were off by before, they are off by after.

use super::packet::{self, Packet};

/// Blanks out the sums that a translation changes.
pub fn without_sums(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let Ok(packet) = packet::read(&frame) else {
        return frame;
    };
    for at in places(&packet, &frame) {
        frame[at] = 0;
        frame[at + 1] = 0;
    }
    frame
}

/// By how much each sum of a frame is off, as numbers that are the same for the same deviation.
pub fn deviations(frame: &[u8]) -> Vec<u32> {
    let Ok(packet) = packet::read(frame) else {
        return Vec::new();
    };
    let mut deviations = Vec::new();
    if packet.source.is_ipv4() {
        deviations.push(sum(&[&frame[14..34]]));
    }
    let is_first = packet.fragment.is_none_or(|fragment| fragment.offset == 0);
    let transport = packet.transport(frame).ok().filter(|_| is_first);
    let Some(transport) = transport else {
        return deviations;
    };
    let payload = packet.payload(frame);
    let pseudo = pseudo_header(&packet, frame);
    match packet.protocol {
        // A datagram without a sum stays so.
        17 if payload[6..8] == [0, 0] => deviations.push(u32::MAX),
        6 | 17 | 58 => deviations.push(sum(&[&pseudo, payload])),
        1 => deviations.push(sum(&[payload])),
        _ => {}
    }
    if transport.is_error && packet.source.is_ipv4() && payload.len() >= 28 {
        deviations.push(sum(&[&payload[8..28]]));
    }
    deviations
}

fn places(packet: &Packet, frame: &[u8]) -> Vec<usize> {
    let mut places = Vec::new();
    if packet.source.is_ipv4() {
        places.push(24);
    }
    let is_first = packet.fragment.is_none_or(|fragment| fragment.offset == 0);
    let Some(transport) = packet.transport(frame).ok().filter(|_| is_first) else {
        return places;
    };
    match packet.protocol {
        6 => places.push(packet.offset + 16),
        17 => places.push(packet.offset + 6),
        1 | 58 => places.push(packet.offset + 2),
        _ => {}
    }
    if transport.is_error && packet.source.is_ipv4() && packet.length >= 28 {
        places.push(packet.offset + 8 + 10);
    }
    places
}

fn pseudo_header(packet: &Packet, frame: &[u8]) -> Vec<u8> {
    let addresses = if packet.source.is_ipv4() {
        &frame[26..34]
    } else {
        &frame[22..54]
    };
    let length = u16::try_from(packet.length).expect("short").to_be_bytes();
    [addresses, &length, &[0, packet.protocol]].concat()
}

/// The ones' complement sum (RFC 1071), zero in one form only.
fn sum(parts: &[&[u8]]) -> u32 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    sum % 0xffff
}

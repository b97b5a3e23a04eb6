//! A migration's stream.

use crate::migration::stream::{Frame, Receiver, Sender};

/// What another host sends: refused, or frames within their limits. Behind a preamble and with right
/// checksums, too, for few bytes get those right by themselves.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn migration(input: &[u8]) {
    receive(input);
    let mut stream = Vec::new();
    Sender::start(&mut stream).expect("memory takes bytes");
    let start = stream.len();
    stream.extend_from_slice(input);
    if let Some(header) = stream.get_mut(start..start + 32) {
        header[1] &= 1;
        header[2..4].fill(0);
        header[12..16].fill(0);
        let checksum = crc32fast::hash(&header[..28]);
        header[28..].copy_from_slice(&checksum.to_le_bytes());
    }
    receive(&stream);
}

fn receive(mut stream: &[u8]) {
    let Ok(mut receiver) = Receiver::start(&mut stream) else {
        return;
    };
    while let Ok(frame) = receiver.receive() {
        if let Frame::Pages { bytes, .. } = &frame {
            assert!(!bytes.is_empty() && bytes.len().is_multiple_of(4096));
        }
        // What was taken can be sent.
        let mut sender = Sender::start(std::io::sink()).expect("it takes bytes");
        sender.send(&frame).expect("a frame within its limits");
    }
}

//! Gives the kernel frames as if a device had received them, from inside the kernel: what a driver does with its
//! hardware's ring, and pktgen's `xmit_mode netif_receive`, without that module.

use std::io;
use std::time::Duration;

use super::namespaces::device_index;
use super::xdp::Program;

/// Where a frame has its source port: after the headers of Ethernet and IPv4.
const SOURCE_PORT: i16 = 34;

/// A device of the calling thread's namespace that seems to receive datagrams of many flows.
#[derive(Debug)]
pub struct Injector {
    program: Program,
    ifindex: u32,
    frame: Vec<u8>,
}

impl Injector {
    /// Makes one for a device. The flows are those of the frame, with source ports from its own on; their number is a
    /// power of two.
    pub fn open(device: &str, frame: &[u8], flows: u16) -> io::Result<Self> {
        Ok(Self {
            program: Program::load(&program(frame, flows))?,
            ifindex: device_index(device)?,
            frame: frame.to_vec(),
        })
    }

    /// Lets the device receive `count` packets; how long it took, without the kernel's preparations, which wait for
    /// other processors.
    pub fn receive(&self, count: u32) -> io::Result<Duration> {
        self.program.run(&self.frame, count, Some(self.ifindex))
    }
}

/// Writes the frame into the packet, whose memory may have been another packet's, with one of the ports; then lets it pass.
fn program(frame: &[u8], flows: u16) -> Vec<u64> {
    const XDP_PASS: i32 = 2;
    const RANDOM: i32 = 7; // BPF_FUNC_get_prandom_u32
    let at = usize::from(SOURCE_PORT.cast_unsigned());
    let first_port = u16::from_be_bytes([frame[at], frame[at + 1]]);
    let words = frame.chunks_exact(4).zip((0i16..).step_by(4));
    let length = i32::try_from(frame.len() / 4 * 4).unwrap_or(0);
    let mut program = vec![
        instruction(0xbf, 6, 1, 0, 0),                    // r6 = context
        instruction(0x85, 0, 0, 0, RANDOM),               // r0 = a random number
        instruction(0x57, 0, 0, 0, i32::from(flows) - 1), // r0 &= flows - 1
        instruction(0x07, 0, 0, 0, first_port.into()),    // r0 += the first port
        instruction(0xdc, 0, 0, 0, 16),                   // r0 = r0 in network order
        instruction(0x61, 2, 6, 0, 0),                    // r2 = data
        instruction(0x61, 3, 6, 4, 0),                    // r3 = data_end
        instruction(0xbf, 4, 2, 0, 0),                    // r4 = r2
        instruction(0x07, 4, 0, 0, length),               // r4 += the frame's length
    ];
    let writes: Vec<u64> = words
        .map(|(word, offset)| {
            let word = i32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
            instruction(0x62, 2, 0, offset, word) // *(u32 *)(r2 + offset) = word
        })
        .chain([instruction(0x6b, 2, 0, SOURCE_PORT, 0)]) // *(u16 *)(r2 + SOURCE_PORT) = r0
        .collect();
    let skip = i16::try_from(writes.len()).unwrap_or(0);
    program.push(instruction(0x2d, 4, 3, skip, 0)); // if r4 > r3, skip them
    program.extend(writes);
    program.push(instruction(0xb7, 0, 0, 0, XDP_PASS)); // r0 = XDP_PASS
    program.push(instruction(0x95, 0, 0, 0, 0)); // exit
    program
}

/// `struct bpf_insn`.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | u64::from(destination | source << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

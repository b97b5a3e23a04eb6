//! `keelson net capture`

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use futures::TryStreamExt;
use jiff::Timestamp;
use keelson_api::proto::{CaptureRequest, CapturedPacket};
use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};

use super::packets::end;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{line, time};

/// Bytes of a packet that are captured at most.
const SNAP_LIMIT: u32 = 4096;

/// Capture the packets of a guest's interface, in both directions, those that are dropped included.
///
/// Without --write, prints a line for each. A file has the verdict of each packet as its comment;
/// `keelson net capture web -w - | tcpdump -r -` decodes them as they come. Ends with Ctrl-C.
#[derive(Args)]
pub struct Capture {
    /// The guest, or one of its interfaces as GUEST/INTERFACE.
    interface: String,
    /// Write pcapng to this file, or to standard output with `-`.
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// End after so many packets.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Capture at most so many bytes of each packet.
    #[arg(
        short,
        long,
        value_name = "BYTES",
        default_value_t = SNAP_LIMIT,
        value_parser = clap::value_parser!(u32).range(14..=i64::from(SNAP_LIMIT))
    )]
    snap_length: u32,
}

/// Where packets go.
enum Sink {
    Lines,
    File(Box<PcapNgWriter<BufWriter<Box<dyn Write + Send>>>>),
}

impl Capture {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let (guest, interface) = self
            .interface
            .split_once('/')
            .unwrap_or((&self.interface, ""));
        let request = CaptureRequest {
            name: guest.into(),
            interface: interface.into(),
            snap_length: self.snap_length,
        };
        let mut packets = client.guests.capture(request).await?.into_inner();
        let mut sink = Sink::open(self.write.as_deref(), &self.interface, self.snap_length)
            .map_err(Failure::Other)?;
        eprintln!("capturing {}; Ctrl-C ends", self.interface);
        let (mut captured, mut lost) = (0, 0);
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        while self.count.is_none_or(|count| captured < count) {
            let packet = tokio::select! {
                packet = packets.try_next() => packet?,
                _ = &mut interrupted => None,
            };
            let Some(packet) = packet else { break };
            sink.take(&packet)?;
            captured += 1;
            lost += packet.lost;
        }
        eprintln!("{captured} packets captured, {lost} lost");
        Ok(())
    }
}

impl Sink {
    fn open(path: Option<&Path>, interface: &str, snap_length: u32) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::Lines);
        };
        let file: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            let file = File::create(path);
            Box::new(file.with_context(|| format!("could not create {}", path.display()))?)
        };
        let description = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: snap_length,
            options: vec![
                InterfaceDescriptionOption::IfName(interface.into()),
                // Powers of ten: nanoseconds.
                InterfaceDescriptionOption::IfTsResol(9),
            ],
        };
        let mut writer = PcapNgWriter::new(BufWriter::new(file))?;
        writer.write_pcapng_block(description)?;
        writer.get_mut().flush()?;
        Ok(Self::File(Box::new(writer)))
    }

    fn take(&mut self, packet: &CapturedPacket) -> Result<(), Failure> {
        match self {
            Self::Lines => line(&text(packet)),
            Self::File(writer) => {
                writer
                    .write_pcapng_block(block(packet))
                    .context("could not write the packet")
                    .map_err(Failure::Other)?;
                // Whoever reads along sees it now, and nothing is lost to a signal.
                let flushed = writer
                    .get_mut()
                    .flush()
                    .context("could not write the packet");
                flushed.map_err(Failure::Other)
            }
        }
    }
}

fn verdict(packet: &CapturedPacket) -> String {
    if packet.reason.is_empty() {
        "passed".into()
    } else {
        format!("dropped: {}", packet.reason)
    }
}

fn block(packet: &CapturedPacket) -> EnhancedPacketBlock<'_> {
    // Seen from the host's device, as tools show it.
    const INBOUND: u32 = 1;
    const OUTBOUND: u32 = 2;
    let direction = if packet.from_guest { INBOUND } else { OUTBOUND };
    EnhancedPacketBlock {
        interface_id: 0,
        timestamp: Duration::from_nanos(packet.unix_nanoseconds.try_into().unwrap_or(0)),
        original_len: packet.length,
        data: packet.data.as_slice().into(),
        options: vec![
            EnhancedPacketOption::Comment(verdict(packet).into()),
            EnhancedPacketOption::Flags(direction),
        ],
    }
}

fn text(packet: &CapturedPacket) -> String {
    let at = Timestamp::from_nanosecond(packet.unix_nanoseconds.into());
    format!(
        "{}   {} guest   {}   {}   {} bytes",
        at.map_or(String::new(), time),
        if packet.from_guest { "from" } else { "to" },
        verdict(packet),
        summary(&packet.data),
        packet.length
    )
}

/// Addresses, ports and protocol, as far as the packet's first bytes tell.
fn summary(data: &[u8]) -> String {
    let Ok(sliced) = LaxSlicedPacket::from_ethernet(data) else {
        return "no Ethernet frame".into();
    };
    let (source, destination, protocol) = match &sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (
                header.source_addr().to_string(),
                header.destination_addr().to_string(),
                ip.payload().ip_number,
            )
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let header = ip.header();
            (
                header.source_addr().to_string(),
                header.destination_addr().to_string(),
                ip.payload().ip_number,
            )
        }
        Some(LaxNetSlice::Arp(_)) => return "arp".into(),
        None => {
            let ether_type = data
                .get(12..14)
                .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            return format!("ethertype {:#06x}", ether_type.unwrap_or(0));
        }
    };
    let (protocol, ports) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            ("tcp".into(), (tcp.source_port(), tcp.destination_port()))
        }
        Some(TransportSlice::Udp(udp)) => {
            ("udp".into(), (udp.source_port(), udp.destination_port()))
        }
        Some(TransportSlice::Icmpv4(icmp)) => (format!("icmp type {}", icmp.type_u8()), (0, 0)),
        Some(TransportSlice::Icmpv6(icmp)) => (format!("icmpv6 type {}", icmp.type_u8()), (0, 0)),
        _ => (format!("protocol {}", protocol.0), (0, 0)),
    };
    format!(
        "{protocol} {} -> {}",
        end(&source, ports.0.into()),
        end(&destination, ports.1.into())
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn packets_are_summed_up() {
        let udp = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(1234, 53);
        let mut frame = Vec::new();
        udp.write(&mut frame, b"question").expect("written");
        assert_eq!(summary(&frame), "udp 10.0.0.1:1234 -> 10.0.0.2:53");
        // Cut short by the snapshot length.
        assert_eq!(summary(&frame[..42]), "udp 10.0.0.1:1234 -> 10.0.0.2:53");
        assert_eq!(summary(&frame[..34]), "protocol 17 10.0.0.1 -> 10.0.0.2");
        assert_eq!(summary(&frame[..14]), "ethertype 0x0800");
        assert_eq!(summary(&frame[..13]), "no Ethernet frame");
    }

    proptest! {
        #[test]
        fn any_bytes_are_summed_up(bytes: Vec<u8>, protocol in 0..5_usize) {
            let types: [[u8; 2]; 5] = [[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0], [1, 2]];
            let frame = [&[0; 12][..], &types[protocol], &bytes].concat();
            let _ = summary(&frame);
        }
    }
}

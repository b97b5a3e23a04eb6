//! The PCI capabilities that say where a virtio device's structures are (virtio 1.2, 4.1.4).

use super::common_config;
use super::transport::{
    BAR_BYTES, COMMON, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER, PAGE, PENDING, TABLE,
};
use crate::pci::{ConfigSpace, msix};

const VENDOR_SPECIFIC: u8 = 0x09;

const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Offsets in `struct virtio_pci_cap`.
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_LENGTH: u16 = 12;
/// `pci_cfg_data` of `struct virtio_pci_cfg_cap`.
const CAP_DATA: u16 = 16;

/// Where the capabilities are that the transport itself looks at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offsets {
    /// The MSI-X message control register.
    pub(super) msix_control: u16,
    pci_config: u16,
}

/// Adds all capabilities for a device with `vectors` MSI-X vectors and `queues` queues.
pub(super) fn add(config: &mut ConfigSpace, vectors: u16, queues: usize) -> Offsets {
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    let doorbells = queues as u64 * u64::from(NOTIFY_MULTIPLIER);
    let mut structure = |kind, offset, length, extra: &[u8], writable: &[u8]| {
        let body = structure_body(kind, offset, length, extra);
        config
            .add_capability(VENDOR_SPECIFIC, &body, writable)
            .unwrap_or(0)
    };
    structure(COMMON_CFG, COMMON, common_config::BYTES, &[], &[]);
    structure(ISR_CFG, ISR, 1, &[], &[]);
    structure(DEVICE_CFG, DEVICE, PAGE, &[], &[]);
    structure(NOTIFY_CFG, NOTIFY, doorbells, &multiplier, &[]);
    // `bar`, `offset` and `length` are the driver's to write; see [`Offsets::window`].
    let mut writable = [0; CAP_DATA as usize - 2];
    writable[usize::from(CAP_BAR) - 2] = 0xff;
    writable[usize::from(CAP_OFFSET) - 2..].fill(0xff);
    let pci_config = structure(PCI_CFG, 0, 0, &[0; 4], &writable);

    let mut body = Vec::with_capacity(10);
    body.extend_from_slice(&vectors.saturating_sub(1).to_le_bytes());
    // The low three bits are the number of the BAR, 0.
    body.extend_from_slice(&low32(TABLE).to_le_bytes());
    body.extend_from_slice(&low32(PENDING).to_le_bytes());
    let writable = msix::CONTROL_WRITABLE.to_le_bytes();
    let msix = config
        .add_capability(msix::CAPABILITY_ID, &body, &writable)
        .unwrap_or(0);
    Offsets {
        msix_control: msix + 2,
        pci_config,
    }
}

/// `struct virtio_pci_cap` after its two-byte header, with what follows it.
fn structure_body(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let total = u8::try_from(usize::from(CAP_DATA) + extra.len()).unwrap_or(u8::MAX);
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend_from_slice(&low32(offset).to_le_bytes());
    body.extend_from_slice(&low32(length).to_le_bytes());
    body.extend_from_slice(extra);
    body
}

impl Offsets {
    /// If an access of the configuration space is one to `pci_cfg_data`, the offset in BAR 0 and
    /// the bytes that it stands for (virtio 1.2, 4.1.4.9).
    pub(super) fn window(
        self,
        config: &ConfigSpace,
        offset: u16,
        length: usize,
    ) -> Option<(u64, usize)> {
        if offset != self.pci_config + CAP_DATA {
            return None;
        }
        let bar = config.read_u16(self.pci_config + CAP_BAR) & 0xff;
        let target = config.read_u32(self.pci_config + CAP_OFFSET);
        let wanted = config.read_u32(self.pci_config + CAP_LENGTH) as usize;
        let end = target.checked_add(u32::try_from(wanted).ok()?)?;
        let usable = bar == 0
            && matches!(wanted, 1 | 2 | 4)
            && target.is_multiple_of(u32::try_from(wanted).ok()?)
            && end <= BAR_BYTES
            && wanted <= length;
        usable.then_some((u64::from(target), wanted))
    }
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

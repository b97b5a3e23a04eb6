//! The ACPI tables (ACPI 6.5): hardware-reduced, so the guest uses no PIC, PIT, SCI or CMOS clock.
//!
//! A stock kernel finds with them its vCPUs (MADT), the PCI bus (MCFG and `\_SB.PCI0`), COM1, the
//! power button behind a generic event device, soft-off (`\_S5`) and the reset register.

mod slots;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use self::slots::HotplugSlots;
use super::{BootError, layout};
use crate::config::Topology;
use crate::memory::Ram;

const OEM_ID: [u8; 6] = *b"KEELSN";
const OEM_TABLE_ID: [u8; 8] = *b"KEELSON ";
const OEM_REVISION: u32 = 1;
/// IAPC_BOOT_ARCH (ACPI 5.2.9.3): no VGA, no CMOS clock, and by its absence no 8042.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
const RSDP_BYTES: u64 = 36;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig {
    /// The number of vCPUs.
    pub vcpus: u8,
    /// How they are arranged, which gives their APIC ids.
    pub topology: Topology,
    /// The PCI slots whose devices stay as long as the machine, a bit for each.
    pub fixed_slots: u32,
}

/// Writes all tables and returns the RSDP's guest-physical address.
pub(super) fn write_tables(memory: &Ram, config: AcpiConfig) -> Result<u64, BootError> {
    let mut tables = TableWriter {
        memory,
        next: layout::ACPI + RSDP_BYTES.next_multiple_of(16),
    };
    let dsdt = tables.write(&dsdt(config))?;
    let entries = [
        tables.write(&fadt(dsdt))?,
        tables.write(&madt(config))?,
        tables.write(&mcfg())?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = tables.write(&xsdt)?;
    tables.next = layout::ACPI;
    tables.write(&Rsdp::new(OEM_ID, xsdt))
}

/// Appends tables to the ACPI area.
struct TableWriter<'a> {
    memory: &'a Ram,
    next: u64,
}

impl TableWriter<'_> {
    fn write(&mut self, table: &dyn Aml) -> Result<u64, BootError> {
        let mut bytes = AmlBytes::default();
        table.to_aml_bytes(&mut bytes);
        let address = self.next;
        self.next += (bytes.0.len() as u64).next_multiple_of(16);
        if self.next > layout::ACPI_END {
            return Err(BootError::Layout {
                what: "ACPI tables",
                message: "too large".to_owned(),
            });
        }
        self.memory
            .write_slice(&bytes.0, GuestAddress(address))
            .map_err(BootError::layout("ACPI tables"))?;
        Ok(address)
    }
}

#[derive(Default)]
struct AmlBytes(Vec<u8>);

impl AmlSink for AmlBytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        GAS::new(
            RegisterSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::PORT_RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"KEELSON\0").into();
    fadt.finalize()
}

fn madt(config: AcpiConfig) -> impl Aml {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for index in 0..config.vcpus {
        // The configuration keeps APIC ids below 255.
        let id = u8::try_from(config.topology.apic_id(index)).unwrap_or(u8::MAX);
        madt.add_structure(ProcessorLocalApic::new(index, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(config: AcpiConfig) -> Sdt {
    let mut aml = AmlBytes::default();
    Scope::new(
        "_SB_".into(),
        vec![
            &PciHostBridge {
                slots: HotplugSlots {
                    fixed: config.fixed_slots,
                },
            },
            &Motherboard,
            &Com1,
            &PowerButton,
            &GenerationId,
            &EventDevice,
        ],
    )
    .to_aml_bytes(&mut aml);
    let sleep_type = layout::SLEEP_TYPE_S5;
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut aml);
    // Revision 2 and above: AML integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml.0);
    dsdt
}

struct PciHostBridge {
    slots: HotplugSlots,
}

impl Aml for PciHostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let window = u32_of(layout::PCI_WINDOW);
        let window_end = u32_of(layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1);
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                // DMA of the devices is coherent: the guest's memory is theirs.
                &Name::new("_CCA".into(), &ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &IO::new(0xcf8, 0xcf8, 1, 8),
                        &AddressSpace::new_memory(
                            AddressSpaceCacheable::NotCacheable,
                            true,
                            window,
                            window_end,
                            None,
                        ),
                    ]),
                ),
                &self.slots,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Reserves the ECAM: Linux uses it only if a motherboard resource covers it.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam = Memory32Fixed::new(true, u32_of(layout::ECAM), u32_of(layout::ECAM_SIZE));
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = layout::PORT_COM1;
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, layout::GSI_COM1),
                        &IO::new(port, port, 1, 8),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The VM generation ID: its address, by which a guest that was cloned notices that it was
/// ("Virtual Machine Generation ID", Microsoft, 2012; drivers/virt/vmgenid.c of Linux).
struct GenerationId;

impl Aml for GenerationId {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let address = u32_of(layout::GENERATION_ID);
        Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"KEEL0001"),
                // The standard's name, and the one that fits the length of ACPI's ids.
                &Name::new(
                    "_CID".into(),
                    &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]),
                ),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The generic event device (ACPI 5.6.9): one interrupt, and a port that says which events.
struct EventDevice;

impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = layout::PORT_EVENTS;
        let interrupt = Interrupt::new(true, true, false, false, layout::GSI_EVENTS);
        let power_button = layout::EVENT_POWER_BUTTON;
        let generation = layout::EVENT_GENERATION;
        let pci = layout::EVENT_PCI;
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                &OpRegion::new("EVRG".into(), OpRegionSpace::SystemIO, &port, &ONE),
                &Field::new(
                    "EVRG".into(),
                    FieldAccessType::Byte,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"EVST", 8)],
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![
                        &Store::new(&Local(0), &Path::new("EVST")),
                        &And::new(&Local(1), &Local(0), &power_button),
                        &If::new(
                            &Equal::new(&Local(1), &power_button),
                            vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                        ),
                        &And::new(&Local(1), &Local(0), &generation),
                        &If::new(
                            &Equal::new(&Local(1), &generation),
                            vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
                        ),
                        &And::new(&Local(1), &Local(0), &pci),
                        &If::new(
                            &Equal::new(&Local(1), &pci),
                            vec![&MethodCall::new("\\_SB_.PCI0.PSCN".into(), vec![])],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn u32_of(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

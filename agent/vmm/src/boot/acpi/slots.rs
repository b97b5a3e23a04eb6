//! The PCI bus's slots as ACPI has them, which is what lets a guest notice by itself that a device comes
//! or is to go (ACPI 6.5, 6.3): `_EJ0` makes a slot one of Linux's `acpiphp`, and a notification of its
//! device has that look at it.

use acpi_tables::aml::{
    And, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::layout;
use crate::pci::SLOTS;

/// "Device check" (ACPI 6.5, table 5.187).
const DEVICE_CHECK: u8 = 1;
/// "Eject request".
const EJECT_REQUEST: u8 = 3;
const REGISTERS: u8 = 3 * 4;

/// What `\_SB.PCI0` has for its slots. Those in `fixed`, a bit for each, have no `_EJ0`: what is there
/// stays.
pub(super) struct HotplugSlots {
    pub(super) fixed: u32,
}

impl HotplugSlots {
    /// Slot 0 has the host bridge.
    fn numbers(&self) -> impl Iterator<Item = u8> {
        let fixed = self.fixed;
        (1u8..)
            .take(SLOTS - 1)
            .filter(move |slot| fixed & bit(*slot) == 0)
    }
}

impl Aml for HotplugSlots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = layout::PORT_PCI_INSERTED;
        OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &port, &REGISTERS).to_aml_bytes(sink);
        Field::new(
            "HPRG".into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            vec![
                FieldEntry::Named(*b"HPIN", 32),
                FieldEntry::Named(*b"HPRM", 32),
                FieldEntry::Named(*b"HPEJ", 32),
            ],
        )
        .to_aml_bytes(sink);
        for slot in self.numbers() {
            slot_device(slot, sink);
        }
        self.scan(sink);
    }
}

impl HotplugSlots {
    /// `PSCN`, which the event device calls: tells each slot what the registers have of it.
    fn scan(&self, sink: &mut dyn AmlSink) {
        let slots: Vec<(Path, u32)> = self
            .numbers()
            .map(|slot| (Path::new(&name(slot)), bit(slot)))
            .collect();
        let (inserted, removal) = (Path::new("HPIN"), Path::new("HPRM"));
        let arrivals: Vec<_> = slots.iter().map(|slot| Tell(slot, DEVICE_CHECK)).collect();
        let departures: Vec<_> = slots.iter().map(|slot| Tell(slot, EJECT_REQUEST)).collect();
        let read_arrivals = Store::new(&Local(0), &inserted);
        let read_departures = Store::new(&Local(0), &removal);
        let mut body: Vec<&dyn Aml> = vec![&read_arrivals];
        body.extend(arrivals.iter().map(|tell| tell as &dyn Aml));
        body.push(&read_departures);
        body.extend(departures.iter().map(|tell| tell as &dyn Aml));
        Method::new("PSCN".into(), 0, true, body).to_aml_bytes(sink);
    }
}

/// Notifies a slot's device if its bit is in `Local0`.
struct Tell<'a>(&'a (Path, u32), u8);

impl Aml for Tell<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self((device, bit), value) = self;
        And::new(&Local(1), &Local(0), bit).to_aml_bytes(sink);
        If::new(
            &Equal::new(&Local(1), bit),
            vec![&Notify::new(device, value)],
        )
        .to_aml_bytes(sink);
    }
}

fn slot_device(slot: u8, sink: &mut dyn AmlSink) {
    let address = u32::from(slot) << 16;
    Device::new(
        name(slot).as_str().into(),
        vec![
            &Name::new("_ADR".into(), &address),
            &Name::new("_SUN".into(), &slot),
            &Method::new(
                "_EJ0".into(),
                1,
                true,
                vec![&Store::new(&Path::new("HPEJ"), &bit(slot))],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn name(slot: u8) -> String {
    format!("S{slot:02X}_")
}

/// The registers' bit of a slot.
const fn bit(slot: u8) -> u32 {
    1 << (slot & 31)
}

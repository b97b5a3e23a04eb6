//! The registers by which PCI devices come and go while the guest runs, as QEMU's and Cloud Hypervisor's
//! guests have them: three ports of 32 bits, a bit for each slot, which the ACPI methods of the slots
//! read and write (`boot/acpi/slots.rs`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::boot::layout;

/// Bytes of a register.
const REGISTER_BYTES: usize = 4;

/// What is pending, a bit for each slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugState {
    /// The guest hasn't read yet that something new is there.
    inserted: u32,
    /// The guest hasn't read yet that it is to let go.
    asked: u32,
    /// The guest is to let go, and has not.
    leaving: u32,
}

/// The registers.
#[derive(Debug, Default)]
pub struct HotplugRegisters(Mutex<HotplugState>);

impl HotplugRegisters {
    /// Whether a port is one of theirs.
    pub const fn covers(port: u16) -> bool {
        matches!(port, layout::PORT_PCI_INSERTED..=HOTPLUG_LAST)
    }

    /// Something new is in `slot`.
    pub fn insert(&self, slot: u8) {
        let mut state = self.lock();
        state.inserted |= bit(slot);
        state.asked &= !bit(slot);
        state.leaving &= !bit(slot);
    }

    /// The guest is to let go of what is in `slot`.
    pub fn ask(&self, slot: u8) {
        let mut state = self.lock();
        state.asked |= bit(slot);
        state.leaving |= bit(slot);
    }

    /// The slots whose functions the guest was asked to let go of, and has not.
    pub fn leaving(&self) -> Vec<u8> {
        slots(self.lock().leaving).collect()
    }

    /// A read. What isn't a whole register reads as all ones, and changes nothing.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        let Ok(register) = <&mut [u8; REGISTER_BYTES]>::try_from(&mut *data) else {
            return data.fill(0xff);
        };
        let mut state = self.lock();
        *register = match port {
            layout::PORT_PCI_INSERTED => std::mem::take(&mut state.inserted),
            layout::PORT_PCI_REMOVAL => std::mem::take(&mut state.asked),
            layout::PORT_PCI_EJECT => 0,
            _ => u32::MAX,
        }
        .to_le_bytes();
    }

    /// A write: returns the slots that the guest has let go of. Those that it was not asked for stay as they
    /// are: what devices it has is the host's to say.
    pub fn write(&self, port: u16, data: &[u8]) -> Vec<u8> {
        let (layout::PORT_PCI_EJECT, Ok(bytes)) = (port, <[u8; REGISTER_BYTES]>::try_from(data))
        else {
            return Vec::new();
        };
        let mut state = self.lock();
        let ejected = u32::from_le_bytes(bytes) & state.leaving;
        state.leaving &= !ejected;
        state.asked &= !ejected;
        slots(ejected).collect()
    }

    /// What is pending, for a snapshot.
    pub fn save(&self) -> HotplugState {
        *self.lock()
    }

    /// Takes what [`Self::save`] gave.
    pub fn restore(&self, state: HotplugState) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, HotplugState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const HOTPLUG_LAST: u16 = layout::PORT_PCI_EJECT + 3;

/// The register's bit of a slot.
const fn bit(slot: u8) -> u32 {
    1 << (slot & 31)
}

fn slots(bits: u32) -> impl Iterator<Item = u8> {
    (0..32).filter(move |slot| bits & bit(*slot) != 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(registers: &HotplugRegisters, port: u16) -> u32 {
        let mut data = [0; 4];
        registers.read(port, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_reads_once_what_came_and_what_is_to_go() {
        let registers = HotplugRegisters::default();
        registers.insert(5);
        registers.ask(3);
        assert_eq!(read(&registers, layout::PORT_PCI_INSERTED), 1 << 5);
        assert_eq!(read(&registers, layout::PORT_PCI_INSERTED), 0);
        assert_eq!(read(&registers, layout::PORT_PCI_REMOVAL), 1 << 3);
        assert_eq!(read(&registers, layout::PORT_PCI_REMOVAL), 0);
        assert_eq!(registers.leaving(), [3]);
    }

    #[test]
    fn only_what_was_asked_for_is_let_go_of_and_once() {
        let registers = HotplugRegisters::default();
        registers.ask(3);
        let everything = u32::MAX.to_le_bytes();
        assert!(
            registers
                .write(layout::PORT_PCI_REMOVAL, &everything)
                .is_empty()
        );
        assert!(registers.write(layout::PORT_PCI_EJECT, &[0xff]).is_empty());
        assert_eq!(registers.write(layout::PORT_PCI_EJECT, &everything), [3]);
        assert!(
            registers
                .write(layout::PORT_PCI_EJECT, &everything)
                .is_empty()
        );
        // Something else in the slot is not what was asked for.
        registers.ask(4);
        registers.insert(4);
        assert!(
            registers
                .write(layout::PORT_PCI_EJECT, &everything)
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn what_a_guest_does_ejects_nothing_that_it_was_not_asked_for(
            asked in prop::collection::vec(0u8..32, 0..4),
            accesses in prop::collection::vec(
                (0x60eu16..0x61e, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 0..64,
            ),
        ) {
            let registers = HotplugRegisters::default();
            for slot in &asked {
                registers.ask(*slot);
            }
            let mut gone = Vec::new();
            for (port, mut data, write) in accesses {
                if write {
                    gone.extend(registers.write(port, &data));
                } else {
                    registers.read(port, &mut data);
                }
            }
            let all = gone.len();
            gone.sort_unstable();
            gone.dedup();
            prop_assert_eq!(gone.len(), all, "ejected twice");
            prop_assert!(gone.iter().all(|slot| asked.contains(slot)));
            let mut left = registers.leaving();
            left.extend(gone);
            left.sort_unstable();
            let mut asked = asked;
            asked.sort_unstable();
            asked.dedup();
            prop_assert_eq!(left, asked);
        }
    }
}

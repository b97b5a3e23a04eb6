//! Routing of interrupts from eventfds into the in-kernel interrupt controllers.
//!
//! The global system interrupts below [`layout::IO_APIC_PINS`] are the pins of the I/O APIC. Every
//! MSI-X vector of every device has a number above, whose message the guest writes into the
//! device's table and [`InterruptRouter::set_message`] gives to KVM.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::layout;
use crate::error::VmmError;

/// KVM's limit of interrupt numbers (`KVM_MAX_IRQ_ROUTES` of Linux on x86).
const MAX_GSI: u32 = 4096;

/// A message-signalled interrupt as the guest programmed it (PCI Local Bus 3.0, 6.8.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message {
    /// The address, with the destination's APIC id.
    pub address: u64,
    /// The data, with the vector.
    pub data: u32,
}

/// The eventfds of a virtual machine: what they raise, and what writes them. KVM has them; without it
/// (tests, fuzzers) devices work as well, each of their doorbells by an exit.
pub trait EventWiring: std::fmt::Debug + Send + Sync {
    /// Replaces the table of interrupts' routes.
    fn route(&self, table: &KvmIrqRouting) -> Result<(), kvm_ioctls::Error>;
    /// Lets a write to `event` raise interrupt `gsi`.
    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error>;
    /// Undoes [`Self::connect`].
    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error>;
    /// Lets a store of any length to the guest-physical `address` write `event`.
    fn ring(&self, event: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error>;
    /// Undoes [`Self::ring`].
    fn unring(&self, event: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error>;
}

impl EventWiring for VmFd {
    fn route(&self, table: &KvmIrqRouting) -> Result<(), kvm_ioctls::Error> {
        self.set_gsi_routing(table)
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.register_irqfd(event, gsi)
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.unregister_irqfd(event, gsi)
    }

    fn ring(&self, event: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
        self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }

    fn unring(&self, event: &EventFd, address: u64) -> Result<(), kvm_ioctls::Error> {
        self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
    }
}

/// The routing table of one virtual machine.
#[derive(Debug)]
pub struct InterruptRouter {
    vm: Arc<dyn EventWiring>,
    state: Mutex<Routes>,
}

#[derive(Debug)]
struct Routes {
    /// How many numbers are taken from each number on.
    taken: BTreeMap<u32, u16>,
    messages: BTreeMap<u32, Message>,
}

impl InterruptRouter {
    /// Routes the I/O APIC's pins, and nothing to the PIC, which a hardware-reduced guest leaves
    /// in its reset state with all inputs unmasked.
    pub fn new(vm: Arc<dyn EventWiring>) -> Result<Self, VmmError> {
        let routes = Routes {
            taken: BTreeMap::new(),
            messages: BTreeMap::new(),
        };
        let result = Self {
            vm,
            state: Mutex::new(routes),
        };
        result
            .commit(&result.state.lock().unwrap_or_else(PoisonError::into_inner))
            .map_err(VmmError::kvm("route interrupts"))?;
        Ok(result)
    }

    /// Takes `count` unused interrupt numbers and returns the first.
    pub fn allocate(&self, count: u16) -> Result<u32, VmmError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut first = layout::IO_APIC_PINS;
        for (start, length) in &state.taken {
            if start - first >= u32::from(count) {
                break;
            }
            first = start + u32::from(*length);
        }
        if first + u32::from(count) > MAX_GSI {
            let source = kvm_ioctls::Error::new(libc::ENOSPC);
            return Err(VmmError::Kvm {
                step: "number so many interrupts",
                source,
            });
        }
        state.taken.insert(first, count);
        Ok(first)
    }

    /// Gives back what [`Self::allocate`] gave, of a device that is gone. KVM forgets the routes with
    /// the next change of any.
    pub fn release(&self, first: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = state.taken.remove(&first) {
            let end = first + u32::from(count);
            state.messages.retain(|gsi, _| !(first..end).contains(gsi));
        }
    }

    /// Gives interrupt number `gsi` the message that the guest programmed.
    pub fn set_message(&self, gsi: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.messages.get(&gsi) == Some(&message) {
            return Ok(());
        }
        let previous = state.messages.insert(gsi, message);
        let result = self.commit(&state);
        if result.is_err() {
            // KVM refuses a whole table for one bad entry: drop it, or no later change would work.
            match previous {
                Some(previous) => state.messages.insert(gsi, previous),
                None => state.messages.remove(&gsi),
            };
        }
        result
    }

    /// Lets a write to `event` raise interrupt `gsi`. An event that is pending already raises it
    /// at once.
    pub fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.vm.connect(event, gsi)
    }

    /// Undoes [`Self::connect`]: later writes stay pending in `event`.
    pub fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), kvm_ioctls::Error> {
        self.vm.disconnect(event, gsi)
    }

    fn commit(&self, routes: &Routes) -> Result<(), kvm_ioctls::Error> {
        let mut entries = Vec::with_capacity(layout::IO_APIC_PINS as usize + routes.messages.len());
        for pin in 0..layout::IO_APIC_PINS {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entries.push(entry);
        }
        for (gsi, message) in &routes.messages {
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = (message.address & 0xffff_ffff) as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        self.vm.route(&table)
    }
}

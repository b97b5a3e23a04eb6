//! The bus: finds the function for a configuration or memory access.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{ConfigSpace, Identity};
use crate::boot::layout;

/// Slots of the bus.
pub const SLOTS: usize = 32;
/// Bits 19:12 of an ECAM offset are device and function, 11:0 the register.
const ECAM_FUNCTION_SHIFT: u32 = 12;
const CONFIG_ADDRESS_ENABLE: u32 = 1 << 31;

/// Red Hat's id for a host bridge of a virtual machine, class 0600: Linux needs one to trust
/// port 0xcf8.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
};

/// A PCI function as the guest reaches it. No access may panic.
pub trait PciFunction: Send {
    /// Reads configuration registers. `offset` and `data` stay within 4 KiB.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration registers.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// Where the function's BAR 0 is decoded now.
    fn window(&self) -> Option<BarWindow>;
    /// Reads BAR 0.
    fn bar_read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0.
    fn bar_write(&mut self, offset: u64, data: &[u8]);
}

/// A range of guest-physical addresses that a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarWindow {
    /// The first address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl BarWindow {
    fn offset(&self, address: u64, length: usize) -> Option<u64> {
        let offset = address.checked_sub(self.base)?;
        (offset.checked_add(length as u64)? <= self.size).then_some(offset)
    }
}

type Slot = Arc<Mutex<dyn PciFunction>>;

/// Segment 0, bus 0, with the host bridge in slot 0.
pub struct PciBus {
    slots: RwLock<[Option<Slot>; SLOTS]>,
    /// The decoded BARs by slot, so that a memory access locks only the function it is for.
    windows: RwLock<[Option<BarWindow>; SLOTS]>,
    config_address: Mutex<u32>,
}

impl PciBus {
    /// A bus with nothing but the host bridge.
    pub fn new() -> Self {
        let bridge: Slot = Arc::new(Mutex::new(HostBridge(ConfigSpace::new(HOST_BRIDGE))));
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(bridge);
        Self {
            slots: RwLock::new(slots),
            windows: RwLock::new([None; SLOTS]),
            config_address: Mutex::new(0),
        }
    }

    /// The first slot with nothing in it.
    pub fn free_slot(&self) -> Option<usize> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().position(Option::is_none)
    }

    /// Whether there is something in a slot.
    pub fn is_taken(&self, slot: usize) -> bool {
        self.slot(slot).is_some()
    }

    /// Puts a function into a slot; returns whether that was free.
    pub fn insert(&self, slot: usize, function: Slot) -> bool {
        let window = function
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .window();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = slots.get_mut(slot).filter(|place| place.is_none()) else {
            return false;
        };
        *place = Some(function);
        self.set_window(slot, window);
        true
    }

    /// Takes the function out of a slot: from now on nothing answers there.
    pub fn remove(&self, slot: usize) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = slots.get_mut(slot) {
            *place = None;
            self.set_window(slot, None);
        }
    }

    fn set_window(&self, slot: usize, window: Option<BarWindow>) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = windows.get_mut(slot) {
            *entry = window;
        }
    }

    /// The address register of port 0xcf8.
    pub fn config_address(&self) -> u32 {
        *self
            .config_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a restored address register, and where the restored functions' BARs are.
    pub fn restore(&self, config_address: u32) {
        *self
            .config_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = config_address;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        for (window, function) in windows.iter_mut().zip(&*slots) {
            *window = function.as_ref().and_then(|function| {
                let function = function.lock().unwrap_or_else(PoisonError::into_inner);
                function.window()
            });
        }
    }

    /// A read of the ECAM, at `offset` from its start.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        let (slot, register) = ecam_target(offset);
        self.config_read(slot, register, data);
    }

    /// A write of the ECAM, at `offset` from its start.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        let (slot, register) = ecam_target(offset);
        self.config_write(slot, register, data);
    }

    /// A read of ports 0xcf8 to 0xcff, at `offset` from 0xcf8.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        let address = *self
            .config_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if offset < 4 {
            for (byte, index) in data.iter_mut().zip(usize::from(offset)..) {
                *byte = address.to_le_bytes().get(index).copied().unwrap_or(0xff);
            }
        } else if let Some((slot, register)) = port_target(address, offset - 4) {
            self.config_read(slot, register, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write of ports 0xcf8 to 0xcff, at `offset` from 0xcf8.
    pub fn port_write(&self, offset: u16, data: &[u8]) {
        let mut address = self
            .config_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if offset >= 4 {
            let target = port_target(*address, offset - 4);
            drop(address);
            if let Some((slot, register)) = target {
                self.config_write(slot, register, data);
            }
        } else if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            // Only a 32-bit write is one to the address register.
            *address = u32::from_le_bytes(bytes);
        }
    }

    /// A load from the memory window; all ones where nothing is.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((function, offset)) => {
                function
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .bar_read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// A store to the memory window.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.find(address, data.len()) {
            function
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .bar_write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(Slot, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let (slot, offset) = windows.iter().enumerate().find_map(|(slot, window)| {
            window
                .and_then(|w| w.offset(address, length))
                .map(|offset| (slot, offset))
        })?;
        drop(windows);
        self.slot(slot).map(|function| (function, offset))
    }

    fn slot(&self, slot: usize) -> Option<Slot> {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(slot)?
            .clone()
    }

    fn config_read(&self, target: Option<usize>, register: u16, data: &mut [u8]) {
        match target.and_then(|slot| self.slot(slot)) {
            Some(function) => {
                function
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .config_read(register, data);
            }
            // What a bus without a device there returns (master abort).
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, target: Option<usize>, register: u16, data: &[u8]) {
        let Some(slot) = target else { return };
        let Some(function) = self.slot(slot) else {
            return;
        };
        let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
        function.config_write(register, data);
        self.set_window(slot, function.window());
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Slot (of function 0 of a device that can be there) and register of an ECAM offset.
fn ecam_target(offset: u64) -> (Option<usize>, u16) {
    let function = (offset >> ECAM_FUNCTION_SHIFT) & 0xff;
    let bus = offset / layout::ECAM_SIZE;
    let register = (offset & 0xfff) as u16;
    let slot = (bus == 0 && function.trailing_zeros() >= 3).then_some((function >> 3) as usize);
    (slot, register)
}

/// Slot and register of a port access at `offset` from 0xcfc, if the address register enables it.
fn port_target(address: u32, offset: u16) -> Option<(Option<usize>, u16)> {
    if address & CONFIG_ADDRESS_ENABLE == 0 {
        return None;
    }
    let bus = (address >> 16) & 0xff;
    let function = (address >> 8) & 0xff;
    let register = (address & 0xfc) as u16 + offset;
    let slot = (bus == 0 && function.trailing_zeros() >= 3).then_some((function >> 3) as usize);
    Some((slot, register))
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn window(&self) -> Option<BarWindow> {
        None
    }

    fn bar_read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _offset: u64, _data: &[u8]) {}
}

//! Power management ports: the ACPI sleep registers, the generic event device, resets.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::legacy::KEYBOARD_RESET;
use crate::boot::layout;
use crate::error::VmmError;
use crate::interrupts::InterruptRouter;
use crate::vcpu::VcpuEnd;

/// Sleep control register (ACPI 4.8.3.7): SLP_TYP and SLP_EN.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The power management ports of one boot of the guest.
#[derive(Debug)]
pub struct Power {
    pending_events: AtomicU8,
    interrupt: EventFd,
}

impl Power {
    /// Connects the generic event device to its interrupt.
    pub fn new(router: &InterruptRouter) -> Result<Self, VmmError> {
        let interrupt =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("create an eventfd"))?;
        router
            .connect(&interrupt, layout::GSI_EVENTS)
            .map_err(VmmError::kvm("connect the event device's interrupt"))?;
        Ok(Self {
            pending_events: AtomicU8::new(0),
            interrupt,
        })
    }

    /// Presses the power button.
    pub fn press_button(&self) -> io::Result<()> {
        self.raise(layout::EVENT_POWER_BUTTON)
    }

    /// Raises events (`layout::EVENT_…`), of which there may be none.
    pub fn raise(&self, events: u8) -> io::Result<()> {
        self.pending_events.fetch_or(events, Ordering::AcqRel);
        self.interrupt.write(1)
    }

    /// The pending events, which stay so.
    pub fn pending_events(&self) -> u8 {
        self.pending_events.load(Ordering::Acquire)
    }

    /// Reads the pending events, which clears them.
    pub fn take_events(&self) -> u8 {
        self.pending_events.swap(0, Ordering::AcqRel)
    }

    /// A write to the sleep control register.
    pub fn sleep(value: u8) -> Option<VcpuEnd> {
        let kind = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        (value & SLEEP_ENABLE != 0 && kind == layout::SLEEP_TYPE_S5).then_some(VcpuEnd::Shutdown)
    }

    /// A write to the reset control register: bit 2 starts the reset that bits 1 and 3 choose.
    pub fn reset_control(value: u8) -> Option<VcpuEnd> {
        (value & 0x04 != 0).then_some(VcpuEnd::Reset)
    }

    /// A write to the keyboard controller's command port.
    pub fn keyboard_command(value: u8) -> Option<VcpuEnd> {
        (value == KEYBOARD_RESET).then_some(VcpuEnd::Reset)
    }
}

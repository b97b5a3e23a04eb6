//! COM1: a 16550A whose output goes to the [`ConsoleOutput`] and whose input comes from it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::layout;
use crate::console::ConsoleOutput;
use crate::error::VmmError;
use crate::interrupts::InterruptRouter;

/// The port as the vCPUs and the console share it.
#[derive(Clone)]
pub struct SerialPort(Arc<Mutex<Serial<IrqLine, InputEvents, OutputWriter>>>);

impl SerialPort {
    /// A port in its reset state.
    pub fn new(router: &InterruptRouter, console: &Arc<ConsoleOutput>) -> Result<Self, VmmError> {
        let event =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("create an eventfd"))?;
        router
            .connect(&event, layout::GSI_COM1)
            .map_err(VmmError::kvm("connect the serial port's interrupt"))?;
        let input = InputEvents(Arc::clone(console));
        let output = OutputWriter(Arc::clone(console));
        Ok(Self(Arc::new(Mutex::new(Serial::with_events(
            IrqLine(event),
            input,
            output,
        )))))
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&self, offset: u8) -> u8 {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset)
    }

    /// The guest writes register `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        let written = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, value);
        if let Err(e) = written {
            tracing::debug!("serial port: {e}");
        }
    }

    /// Offers input to the guest; returns how many bytes the FIFO took.
    pub fn send(&self, input: &[u8]) -> usize {
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A full FIFO is an error of vm-superio, and no bytes taken here.
        serial.enqueue_raw_bytes(input).unwrap_or(0)
    }
}

struct IrqLine(EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct OutputWriter(Arc<ConsoleOutput>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct InputEvents(Arc<ConsoleOutput>);

impl SerialEvents for InputEvents {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.input_wanted();
    }
}

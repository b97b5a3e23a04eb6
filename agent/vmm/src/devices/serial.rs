//! COM1: a 16550A whose output goes to the [`ConsoleOutput`] and whose input comes from it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::layout;
use crate::console::{ConsoleInput, ConsoleOutput};
use crate::error::VmmError;
use crate::interrupts::InterruptRouter;

/// The port as the vCPUs and the console share it.
#[derive(Clone)]
pub struct SerialPort(Arc<Mutex<Serial<IrqLine, InputEvents, OutputWriter>>>);

impl SerialPort {
    /// A port in its reset state, or in `state`.
    pub fn new(
        router: &InterruptRouter,
        console: &Arc<ConsoleOutput>,
        state: Option<&SerialState>,
    ) -> Result<Self, VmmError> {
        let event =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("create an eventfd"))?;
        router
            .connect(&event, layout::GSI_COM1)
            .map_err(VmmError::kvm("connect the serial port's interrupt"))?;
        let input = InputEvents(Arc::clone(console));
        let output = OutputWriter(Arc::clone(console));
        let line = IrqLine(event);
        let serial = match state {
            None => Serial::with_events(line, input, output),
            Some(state) => Serial::from_state(&state.registers(), line, input, output)
                .map_err(|e| VmmError::os("restore the serial port")(io::Error::other(e)))?,
        };
        Ok(Self(Arc::new(Mutex::new(serial))))
    }

    /// The registers and what is in the receive FIFO.
    pub fn save(&self) -> SerialState {
        let state = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupts: [state.interrupt_enable, state.interrupt_identification],
            line: [state.line_control, state.line_status],
            modem: [state.modem_control, state.modem_status],
            scratch: state.scratch,
            input: state.in_buffer,
        }
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
}

impl ConsoleInput for SerialPort {
    fn send(&self, input: &[u8]) -> usize {
        if input.is_empty() {
            return 0;
        }
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A full FIFO is an error of vm-superio, and no bytes taken here.
        serial.enqueue_raw_bytes(input).unwrap_or(0)
    }
}

/// A port's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low and high.
    divisor: [u8; 2],
    /// Interrupt enable and identification.
    interrupts: [u8; 2],
    /// Line control and status.
    line: [u8; 2],
    /// Modem control and status.
    modem: [u8; 2],
    scratch: u8,
    /// The receive FIFO.
    input: Vec<u8>,
}

impl SerialState {
    fn registers(&self) -> vm_superio::SerialState {
        vm_superio::SerialState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupts[0],
            interrupt_identification: self.interrupts[1],
            line_control: self.line[0],
            line_status: self.line[1],
            modem_control: self.modem[0],
            modem_status: self.modem[1],
            scratch: self.scratch,
            in_buffer: self.input.clone(),
        }
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

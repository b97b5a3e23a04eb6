//! The port between a console device's queues and the console's host side.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::DescriptorChain;
use vm_memory::Bytes;

use crate::console::{ConsoleInput, ConsoleOutput};
use crate::memory::GuestMemory;
use crate::virtio::served_queue::{Broken, ServedQueue, Turn};
use crate::virtio::{Activation, ActivationError, DeviceHealth, FEATURE_EVENT_IDX};

/// What is copied at once.
const CHUNK: usize = 4096;
/// What is printed of one buffer; no driver's is larger. The rest is dropped, so that a guest can't keep
/// a thread here for long.
const MAX_BUFFER: usize = 64 << 10;

/// The size of the terminal that shows the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsoleSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl Default for ConsoleSize {
    /// What programs take a terminal for that doesn't say.
    fn default() -> Self {
        Self {
            columns: 80,
            rows: 24,
        }
    }
}

/// A console's port. It outlives the guest's reboots, and has queues while a driver serves it.
pub struct ConsolePort {
    output: Arc<ConsoleOutput>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    size: ConsoleSize,
    /// Counts changes of the size.
    generation: u8,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    receive: Option<ServedQueue>,
    transmit: Option<ServedQueue>,
    health: DeviceHealth,
}

impl ConsolePort {
    /// A port that prints to `output`.
    pub fn new(output: Arc<ConsoleOutput>) -> Self {
        Self {
            output,
            state: Mutex::default(),
        }
    }

    /// The terminal's size, as the driver reads it.
    pub fn size(&self) -> ConsoleSize {
        self.state().size
    }

    /// Changes it, and tells the driver.
    pub fn resize(&self, size: ConsoleSize) {
        let mut state = self.state();
        if state.size == size {
            return;
        }
        state.size = size;
        state.generation = state.generation.wrapping_add(1);
        if let Some(active) = &state.active {
            active.health.config_changed();
        }
    }

    /// Another number after each change of the size.
    pub(super) fn generation(&self) -> u8 {
        self.state().generation
    }

    /// Prints without a queue.
    pub(super) fn print(&self, bytes: &[u8]) {
        self.output.push(bytes);
    }

    /// A driver has set its queues up, or the guest goes on with them.
    pub(super) fn connect(&self, activation: Activation) -> Result<(), ActivationError> {
        self.state().active = Some(Active::open(activation)?);
        // Both may have something from before.
        self.take_output();
        self.buffers_given();
        Ok(())
    }

    /// When this returns no buffer of the guest is touched any more.
    pub(super) fn disconnect(&self) {
        self.state().active = None;
    }

    /// The driver has given buffers for input: the thread that has some is to look again.
    pub(super) fn buffers_given(&self) {
        self.output.input_wanted();
    }

    /// Prints what the driver has sent.
    pub(super) fn take_output(&self) {
        if self.serve(|active| active.print(&self.output)) == Turn::More {
            // Another vCPU of the guest goes on sending: the rest is for the console's own thread.
            self.output.input_wanted();
        }
    }

    /// Serves a queue, if there is a driver; one that breaks the rules has to reset the device.
    fn serve(&self, step: impl FnOnce(&mut Active) -> Result<Turn, Broken>) -> Turn {
        let mut state = self.state();
        let Some(active) = &mut state.active else {
            return Turn::Done;
        };
        match step(active) {
            Ok(turn) => turn,
            Err(e) => {
                tracing::warn!("the guest's console queue is broken: {e}");
                active.health.needs_reset();
                state.active = None;
                Turn::Done
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleInput for Arc<ConsolePort> {
    fn send(&self, input: &[u8]) -> usize {
        self.take_output();
        let mut given = 0;
        let turn = self.serve(|active| active.give(input, &mut given));
        if turn == Turn::More {
            self.output.input_wanted();
        }
        given
    }
}

impl Active {
    fn open(activation: Activation) -> Result<Self, ActivationError> {
        let memory = activation.memory;
        let event_idx = activation.features & FEATURE_EVENT_IDX != 0;
        let (mut receive, mut transmit) = (None, None);
        for queue in activation.queues {
            let served = ServedQueue::open(queue, &memory, event_idx)?;
            let place = if served.index == super::RECEIVE {
                &mut receive
            } else {
                &mut transmit
            };
            *place = Some(served);
        }
        Ok(Self {
            memory,
            receive,
            transmit,
            health: activation.health,
        })
    }

    /// Prints the transmit queue's buffers: at most a queue of them.
    fn print(&mut self, output: &ConsoleOutput) -> Result<Turn, Broken> {
        let Some(transmit) = &mut self.transmit else {
            return Ok(Turn::Done);
        };
        transmit.serve(|chain| {
            print_buffer(&self.memory, chain, output);
            0
        })
    }

    /// Gives the guest input as far as it has buffers for it; `given` says how much that was.
    fn give(&mut self, input: &[u8], given: &mut usize) -> Result<Turn, Broken> {
        let Some(receive) = &mut self.receive else {
            return Ok(Turn::Done);
        };
        let mut turn = Turn::Done;
        // Buffers may have no room at all, so their number is limited as well.
        for left in (0..receive.size()).rev() {
            let rest = input.get(*given..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            let Some(chain) = receive.pop()? else {
                break;
            };
            let head = chain.head_index();
            let written = fill_buffer(&self.memory, chain, rest);
            *given += written;
            receive.put(head, u32::try_from(written).unwrap_or(u32::MAX))?;
            if left == 0 && *given < input.len() {
                turn = Turn::More;
            }
        }
        receive.finish()?;
        Ok(turn)
    }
}

/// Prints what a buffer of the driver holds. What isn't in memory isn't printed.
fn print_buffer(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>, output: &ConsoleOutput) {
    let mut bytes = [0; CHUNK];
    let mut room = MAX_BUFFER;
    for descriptor in chain.readable() {
        let mut left = descriptor.len() as usize;
        let mut address = descriptor.addr();
        while left > 0 && room > 0 {
            let length = left.min(room).min(CHUNK);
            let chunk = &mut bytes[..length];
            if memory.read_slice(chunk, address).is_err() {
                return;
            }
            output.push(chunk);
            left -= length;
            room -= length;
            address.0 = address.0.saturating_add(length as u64);
        }
        output.count_dropped(left as u64);
    }
}

/// Writes as much of `input` into a buffer of the driver as it has room for; returns how much.
fn fill_buffer(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>, input: &[u8]) -> usize {
    let mut written = 0;
    for descriptor in chain.writable() {
        let rest = input.get(written..).unwrap_or_default();
        let length = rest.len().min(descriptor.len() as usize);
        let Some(bytes) = rest.get(..length).filter(|bytes| !bytes.is_empty()) else {
            continue;
        };
        if memory.write_slice(bytes, descriptor.addr()).is_err() {
            break;
        }
        written += length;
    }
    written
}

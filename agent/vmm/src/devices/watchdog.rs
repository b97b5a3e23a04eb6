//! The guest's watchdog: an Intel 6300ESB (its data sheet, order number 300641, chapter 16), which
//! stock kernels have a driver for (`CONFIG_I6300ESB_WDT`).
//!
//! It has two stages, each with a preload in units of 2^15 or 2^5 cycles of the 33 MHz PCI clock. A
//! driver that wants the timer to begin anew writes 0x80 and 0x86 to the reload register, and then
//! the reload bit. At the end of the second stage the guest is reset, or what else is configured.

mod timer;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::VmmError;
use crate::isolation::seccomp::Mode;
use crate::pci::{BarWindow, ConfigSpace, Identity, PciFunction};

use timer::Timer;

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    revision: 0,
    class: 0x08_8000,
};
const BAR_BYTES: u32 = 0x1000;

/// Configuration registers: what the timer does, and whether it runs.
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
/// Of [`CONFIG`]: don't reset at the end, and count in units of 2^5 cycles, not 2^15.
const CONFIG_NO_REBOOT: u16 = 1 << 5;
const CONFIG_FAST: u16 = 1 << 2;
/// What a driver may write there: the interrupt's type as well, which there is none of.
const CONFIG_WRITABLE: u16 = CONFIG_NO_REBOOT | CONFIG_FAST | 3;
/// Of [`LOCK`]: free running, enabled, and locked until a reset.
const LOCK_FREE_RUN: u8 = 1 << 2;
const LOCK_ENABLED: u8 = 1 << 1;
const LOCK_LOCKED: u8 = 1;

/// Registers in BAR 0.
const TIMER_1: u64 = 0x00;
const TIMER_2: u64 = 0x04;
const RELOAD: u64 = 0x0c;
const PRELOAD_MASK: u32 = 0xf_ffff;
const UNLOCK: [u8; 2] = [0x80, 0x86];
/// Of [`RELOAD`]: begin anew; and, cleared by writing it, that the second stage has ended.
const RELOAD_BEGIN: u16 = 1 << 8;
const RELOAD_ENDED: u16 = 1 << 9;

/// A cycle of the PCI clock in picoseconds.
const CYCLE_PS: u64 = 30_303;

/// Who is told that the time is over. Called from the timer's thread.
pub type WatchdogReporter = Box<dyn Fn() + Send>;

/// The device.
pub struct Watchdog {
    config: ConfigSpace,
    state: Registers,
    timer: Timer,
}

/// The registers that are not configuration registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    preload: [u32; 2],
    config: u16,
    lock: u8,
    /// How much of the unlocking sequence was written: 2 is all.
    unlocked: u8,
}

/// What a snapshot keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    registers: Vec<u8>,
    state: Registers,
    /// What was left of the time, in milliseconds, if it ran.
    left_ms: Option<u64>,
}

impl Watchdog {
    /// A device whose BAR 0 starts out at `base`, and its timer's thread.
    pub fn new(base: u32, report: WatchdogReporter, seccomp: Mode) -> Result<Self, VmmError> {
        let timer =
            Timer::start(report, seccomp).map_err(VmmError::os("start the watchdog's thread"))?;
        Ok(Self::with(base, timer))
    }

    fn with(base: u32, timer: Timer) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.set_bar0(base, BAR_BYTES);
        Self {
            config,
            state: Registers {
                preload: [PRELOAD_MASK; 2],
                config: 0,
                lock: 0,
                unlocked: 0,
            },
            timer,
        }
    }

    /// Stops the time while the guest stands still.
    pub fn pause(&self) {
        self.timer.pause();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.timer.resume();
    }

    /// The state of a paused device.
    pub fn save(&self) -> WatchdogState {
        WatchdogState {
            registers: self.config.bytes().to_vec(),
            state: self.state,
            left_ms: self
                .timer
                .left()
                .map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// Takes what [`Self::save`] gave; the time stands still until [`Self::resume`].
    pub fn restore(&mut self, state: &WatchdogState) {
        // Only what a driver can write is taken over.
        self.config.write(0, &state.registers);
        self.state = Registers {
            preload: state.state.preload.map(|preload| preload & PRELOAD_MASK),
            config: state.state.config & CONFIG_WRITABLE,
            lock: state.state.lock & (LOCK_FREE_RUN | LOCK_ENABLED | LOCK_LOCKED),
            unlocked: state.state.unlocked.min(2),
        };
        self.timer.pause();
        // No longer than both stages can take.
        let longest = Duration::from_hours(24);
        self.timer.set(
            state
                .left_ms
                .map(|left| Duration::from_millis(left).min(longest)),
        );
    }

    /// How long both stages take.
    fn period(&self) -> Duration {
        let shift = if self.state.config & CONFIG_FAST == 0 {
            15
        } else {
            5
        };
        let [first, second] = self.state.preload.map(u64::from);
        let cycles = (first + second + 2) << shift;
        Duration::from_nanos(
            u64::try_from(u128::from(cycles) * u128::from(CYCLE_PS) / 1000).unwrap_or(u64::MAX),
        )
    }

    /// Begins anew, or stops.
    fn arm(&self) {
        let running = self.state.lock & LOCK_ENABLED != 0
            && self.state.lock & LOCK_FREE_RUN == 0
            && self.state.config & CONFIG_NO_REBOOT == 0;
        self.timer.set(running.then(|| self.period()));
    }

    fn write_lock(&mut self, value: u8) {
        if self.state.lock & LOCK_LOCKED != 0 {
            return;
        }
        let before = self.state.lock;
        self.state.lock = value & (LOCK_FREE_RUN | LOCK_ENABLED | LOCK_LOCKED);
        if (before ^ self.state.lock) & (LOCK_ENABLED | LOCK_FREE_RUN) != 0 {
            self.arm();
        }
    }

    /// Preloads and the reload bit are written after the unlocking sequence only.
    fn write_register(&mut self, offset: u64, value: u32) {
        let [first, second] = UNLOCK.map(u32::from);
        if offset == RELOAD && value == first {
            self.state.unlocked = 1;
            return;
        }
        if offset == RELOAD && value == second && self.state.unlocked == 1 {
            self.state.unlocked = 2;
            return;
        }
        let unlocked = std::mem::take(&mut self.state.unlocked) == 2;
        if !unlocked {
            return;
        }
        match offset {
            TIMER_1 => self.state.preload[0] = value & PRELOAD_MASK,
            TIMER_2 => self.state.preload[1] = value & PRELOAD_MASK,
            RELOAD => {
                let value = (value & 0xffff) as u16;
                if value & RELOAD_ENDED != 0 {
                    self.timer.forget_end();
                }
                if value & RELOAD_BEGIN != 0 {
                    self.arm();
                }
            }
            _ => {}
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            TIMER_1 => self.state.preload[0],
            TIMER_2 => self.state.preload[1],
            RELOAD if self.timer.has_ended() => u32::from(RELOAD_ENDED),
            _ => 0,
        }
    }
}

impl PciFunction for Watchdog {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
        let [low, high] = self.state.config.to_le_bytes();
        for (register, value) in [(CONFIG, low), (CONFIG + 1, high), (LOCK, self.state.lock)] {
            let at = register.checked_sub(offset).map(usize::from);
            if let Some(byte) = at.and_then(|at| data.get_mut(at)) {
                *byte = value;
            }
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (CONFIG, [low, high]) => {
                self.state.config = u16::from_le_bytes([*low, *high]) & CONFIG_WRITABLE;
            }
            (LOCK, [value]) => self.write_lock(*value),
            _ => self.config.write(offset, data),
        }
    }

    fn window(&self) -> Option<BarWindow> {
        self.config.bar0_window()
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        let value = self.read_register(offset).to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = value.get(index).copied().unwrap_or(0);
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        self.write_register(offset, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux' driver writes for a time of `seconds`.
    fn start(watchdog: &mut Watchdog, seconds: u32) {
        for timer in [TIMER_1, TIMER_2] {
            for unlock in UNLOCK {
                watchdog.bar_write(RELOAD, &[unlock, 0]);
            }
            watchdog.bar_write(timer, &(seconds << 9).to_le_bytes());
        }
        for unlock in UNLOCK {
            watchdog.bar_write(RELOAD, &[unlock, 0]);
        }
        watchdog.bar_write(RELOAD, &RELOAD_BEGIN.to_le_bytes());
        watchdog.config_write(LOCK, &[LOCK_ENABLED]);
    }

    fn device() -> (Watchdog, std::sync::mpsc::Receiver<()>) {
        let (sender, ends) = std::sync::mpsc::channel();
        let report = Box::new(move || {
            let _ = sender.send(());
        });
        let timer = Timer::start(report, Mode::Off).expect("a thread");
        (Watchdog::with(0xc000_0000, timer), ends)
    }

    #[test]
    fn a_heartbeat_of_linux_is_about_its_seconds() {
        let (mut watchdog, _ends) = device();
        start(&mut watchdog, 30);
        let period = watchdog.period().as_secs_f64();
        assert!((29.0..32.0).contains(&period), "{period}");
        assert!(
            watchdog
                .timer
                .left()
                .is_some_and(|left| left.as_secs() >= 20)
        );
    }

    #[test]
    fn without_the_sequence_nothing_changes() {
        let (mut watchdog, _ends) = device();
        watchdog.bar_write(TIMER_1, &[1, 0, 0, 0]);
        watchdog.bar_write(RELOAD, &[0x86, 0]);
        watchdog.bar_write(TIMER_1, &[1, 0, 0, 0]);
        let mut value = [0; 4];
        watchdog.bar_read(TIMER_1, &mut value);
        assert_eq!(u32::from_le_bytes(value), PRELOAD_MASK);
    }

    #[test]
    fn it_ends_once_and_only_while_it_runs() {
        let (mut watchdog, ends) = device();
        start(&mut watchdog, 0);
        ends.recv().expect("it ends");
        let mut value = [0; 2];
        watchdog.bar_read(RELOAD, &mut value);
        assert_eq!(u16::from_le_bytes(value), RELOAD_ENDED);
        watchdog.config_write(LOCK, &[0]);
        assert_eq!(watchdog.timer.left(), None);
    }

    #[test]
    fn a_locked_one_can_not_be_stopped() {
        let (mut watchdog, _ends) = device();
        start(&mut watchdog, 100);
        watchdog.config_write(LOCK, &[LOCK_ENABLED | LOCK_LOCKED]);
        watchdog.config_write(LOCK, &[0]);
        assert!(watchdog.timer.left().is_some());
    }

    #[test]
    fn a_paused_one_keeps_what_is_left() {
        let (mut watchdog, _ends) = device();
        start(&mut watchdog, 100);
        watchdog.pause();
        let saved = watchdog.save();
        assert!(saved.left_ms.is_some_and(|left| left > 0));
        let (mut restored, _ends) = device();
        restored.restore(&saved);
        assert_eq!(restored.save(), saved);
        assert_eq!(restored.period(), watchdog.period());
    }
}

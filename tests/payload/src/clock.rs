//! Time. The time stamp counter counts; its frequency comes from the local APIC's timer, whose clock in
//! KVM is 1 GHz (`KVM_CAP_X86_APIC_BUS_CYCLES_NS` aside).

use crate::error::Error;
use crate::interrupts;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

const LVT_TIMER: u64 = 0x320;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const DIVIDE_BY_1: u32 = 0b1011;
const MASKED: u32 = 1 << 16;

/// Long enough that the two register exits around it are an error of a few per cent at most.
const CALIBRATION_NANOSECONDS: u64 = 1_000_000;

static START: AtomicU64 = AtomicU64::new(0);
/// The time stamp at which the local APIC's timer began to count down.
static TIMER_START: AtomicU64 = AtomicU64::new(0);
/// Time stamps per second.
static FREQUENCY: AtomicU64 = AtomicU64::new(0);

/// Starts counting; [`calibrate`] must follow before the timer has run down (4 s).
pub fn start() {
    START.store(time_stamp(), Ordering::Relaxed);
    let apic = interrupts::local_apic();
    // The window is whole: none of these can fail.
    let _ = apic.write32(DIVIDE, DIVIDE_BY_1);
    let _ = apic.write32(LVT_TIMER, MASKED | u32::from(interrupts::TIMER));
    let _ = apic.write32(INITIAL_COUNT, u32::MAX);
    TIMER_START.store(time_stamp(), Ordering::Relaxed);
}

/// The processor's time stamp counter.
pub fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Time stamps since [`start`].
pub fn since_start() -> u64 {
    time_stamp().saturating_sub(START.load(Ordering::Relaxed))
}

/// Nanoseconds for a number of time stamps.
pub fn nanoseconds(stamps: u64) -> u64 {
    let frequency = u128::from(frequency());
    u64::try_from(u128::from(stamps) * 1_000_000_000 / frequency).unwrap_or(u64::MAX)
}

/// A time after which waiting is given up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    stamp: u64,
}

impl Deadline {
    /// So many milliseconds from now.
    pub fn after_milliseconds(milliseconds: u64) -> Self {
        let stamps = u128::from(frequency()) * u128::from(milliseconds) / 1000;
        Self {
            stamp: time_stamp().saturating_add(u64::try_from(stamps).unwrap_or(u64::MAX)),
        }
    }

    /// The earlier one of two.
    pub fn earlier(self, other: Self) -> Self {
        if other.stamp < self.stamp {
            other
        } else {
            self
        }
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        time_stamp() >= self.stamp
    }

    /// Halts until an interrupt that isn't among the `seen` ones of [`interrupts::total`], or the
    /// deadline, whose own interrupt the local APIC's timer gives.
    pub fn wait(self, seen: u64) -> Result<(), Error> {
        let left = nanoseconds(self.stamp.saturating_sub(time_stamp()));
        let count = u32::try_from(left).unwrap_or(u32::MAX).max(1);
        let apic = interrupts::local_apic();
        apic.write32(LVT_TIMER, u32::from(interrupts::TIMER))?;
        apic.write32(INITIAL_COUNT, count)?;
        interrupts::wait_for_more_than(seen);
        apic.write32(LVT_TIMER, MASKED | u32::from(interrupts::TIMER))?;
        apic.write32(INITIAL_COUNT, 0)
    }
}

/// Measures the time stamp counter's frequency; waits until enough of [`start`]'s count has passed.
pub fn calibrate() {
    let apic = interrupts::local_apic();
    loop {
        let left = apic.read32(CURRENT_COUNT).unwrap_or(0);
        let passed = u64::from(u32::MAX - left);
        if passed >= CALIBRATION_NANOSECONDS {
            let stamps = time_stamp().saturating_sub(TIMER_START.load(Ordering::Relaxed));
            let measured = u128::from(stamps) * 1_000_000_000 / u128::from(passed);
            let measured = u64::try_from(measured).unwrap_or(u64::MAX).max(1);
            FREQUENCY.store(measured, Ordering::Relaxed);
            return;
        }
    }
}

fn frequency() -> u64 {
    FREQUENCY.load(Ordering::Relaxed).max(1)
}

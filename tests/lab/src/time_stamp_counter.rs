use std::time::{Duration, Instant};

/// The frequency of this machine's time stamp counter, in kHz.
///
/// QEMU's emulation passes the counter through. Left to itself, the lab's kernel measures it
/// against the emulated PIT, which fails when this machine is busy, and then it hangs; so it is
/// told (`tsc_early_khz`, Documentation/admin-guide/kernel-parameters.txt).
pub(crate) fn frequency_khz() -> u64 {
    // A descheduled moment between the two clocks spoils a sample; the median of five does not mind.
    let mut samples: Vec<u64> = (0..5).map(|_| sample()).collect();
    samples.sort_unstable();
    samples[samples.len() / 2]
}

fn sample() -> u64 {
    let (start, ticks) = (Instant::now(), counter());
    std::thread::sleep(Duration::from_millis(10));
    let (elapsed, ticks) = (start.elapsed(), counter() - ticks);
    u64::try_from(u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
}

fn counter() -> u64 {
    // SAFETY: RDTSC is in every x86-64 processor and only reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

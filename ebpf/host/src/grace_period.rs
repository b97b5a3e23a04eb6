//! Waits until no program runs any more that could have seen an older state of a map.

use std::time::Duration;

/// `MEMBARRIER_CMD_GLOBAL` of linux/membarrier.h; the kernel implements it as `synchronize_rcu()`,
/// and BPF programs run as RCU readers.
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// A program runs for about a microsecond in softirq context. Where the kernel has no global
/// barrier (full dynticks), this is long enough for one by four orders of magnitude, even on a
/// virtual CPU that is scheduled away.
const WITHOUT_BARRIER: Duration = Duration::from_millis(100);

/// Returns after an RCU grace period.
pub fn wait() {
    // SAFETY: membarrier(2) takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        std::thread::sleep(WITHOUT_BARRIER);
    }
}

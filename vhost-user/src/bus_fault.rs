//! Surviving a frontend that shortens the file behind the guest's memory.
//!
//! Touching a page past the end of a mapped file raises SIGBUS, which would end the process.
//! The handler puts empty memory in the place of the whole region instead, and the queues that
//! work on it stop as broken. The kernel's own accesses fail with EFAULT and need no care.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::guest_memory::MAX_REGIONS;

// Start and end of each guarded mapping; a start of 0 marks a free entry. Twice the limit,
// since a new memory table is mapped before the old one goes.
static GUARDED: [(AtomicUsize, AtomicUsize); 2 * MAX_REGIONS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 2 * MAX_REGIONS];

static LOST: AtomicUsize = AtomicUsize::new(0);

/// Installs the handler for the whole process.
pub fn install() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which zeroes are valid; the handler only makes
    // async-signal-safe system calls and uses atomics.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// How many regions have been lost so far. A queue that sees it change must stop.
pub fn lost_regions() -> usize {
    LOST.load(Ordering::Relaxed)
}

/// A mapping whose loss the process survives, as long as this exists.
#[derive(Debug)]
pub struct Guard(Option<&'static (AtomicUsize, AtomicUsize)>);

impl Guard {
    /// Guards `len` bytes from `start` on, which must be a mapping of guest memory that lives
    /// longer than the guard.
    pub fn new(start: usize, len: usize) -> Self {
        let entry = GUARDED.iter().find(|(entry, _)| {
            let free = entry.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            free.is_ok()
        });
        if let Some((entry, end)) = entry {
            end.store(start + len, Ordering::Release);
            entry.store(start, Ordering::Release);
        }
        Self(entry)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some((start, end)) = self.0 {
            end.store(0, Ordering::Release);
            start.store(0, Ordering::Release);
        }
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and a SIGBUS has an address in it.
    let address = unsafe { (*info).si_addr() } as usize;
    for (start, end) in &GUARDED {
        let (start, end) = (start.load(Ordering::Acquire), end.load(Ordering::Acquire));
        if start > 1 && (start..end).contains(&address) && replace(start, end - start) {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // Not guest memory: let the access fault again and end the process.
    // SAFETY: a plain system call.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

fn replace(start: usize, len: usize) -> bool {
    // SAFETY: the range is exactly one mapping of guest memory, which Rust only accesses
    // through volatile reads and writes that take any content.
    let address = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    address != libc::MAP_FAILED
}

//! Surviving a frontend that shortens the file behind the guest's memory.
//!
//! Touching a page past the end of a mapped file raises SIGBUS, which would end the process.
//! The handler puts empty memory in the place of the whole region instead, and the queues that
//! work on it stop as broken. The kernel's own accesses fail with EFAULT and need no care.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings that can be guarded at once, of all frontends together.
const MAX_GUARDED: usize = 8192;

// A guarded mapping; a start of 0 marks a free entry.
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static GUARDED: [Entry; MAX_GUARDED] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAX_GUARDED];

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

/// A mapping whose loss the process survives, as long as this exists.
#[derive(Debug)]
pub struct Guard(Option<&'static Entry>);

impl Guard {
    /// Guards `len` bytes from `start` on, which must be a shared mapping that lives longer than
    /// the guard and is accessed only in ways that take any content.
    pub fn new(start: usize, len: usize) -> Self {
        let entry = GUARDED.iter().find(|entry| {
            let free = entry
                .start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            free.is_ok()
        });
        if let Some(entry) = entry {
            entry.lost.store(false, Ordering::Relaxed);
            entry.end.store(start + len, Ordering::Release);
            entry.start.store(start, Ordering::Release);
        }
        Self(entry)
    }

    /// Whether the mapping was lost.
    pub fn is_lost(&self) -> bool {
        self.0
            .is_some_and(|entry| entry.lost.load(Ordering::Relaxed))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(entry) = self.0 {
            entry.end.store(0, Ordering::Release);
            entry.start.store(0, Ordering::Release);
        }
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and a SIGBUS has an address in it.
    let address = unsafe { (*info).si_addr() } as usize;
    for entry in &GUARDED {
        let start = entry.start.load(Ordering::Acquire);
        let end = entry.end.load(Ordering::Acquire);
        if start > 1 && (start..end).contains(&address) && replace(start, end - start) {
            entry.lost.store(true, Ordering::Relaxed);
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

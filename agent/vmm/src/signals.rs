//! SIGTERM and SIGINT end the guest, as the API's `kill` does.

use std::io;
use std::mem::MaybeUninit;

use crate::api::{Control, ControlSender};
use crate::isolation::seccomp::{self, Mode, Thread};

/// Blocks both signals in this thread and those that it starts later, and waits for them in a
/// thread of its own.
pub(crate) fn end_on_termination(control: ControlSender, seccomp: Mode) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set before the other calls read it.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        set.assume_init()
    };
    // SAFETY: `set` is initialized, and the old mask isn't asked for.
    let error =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(64 << 10)
        .spawn(move || {
            if let Err(e) = seccomp::apply(Thread::Signals, seccomp) {
                tracing::error!("{e}");
                control(Control::Kill);
                return;
            }
            let mut signal = 0;
            // SAFETY: both pointers are to live values of the types that sigwait takes.
            while unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                tracing::info!(signal, "ending the guest");
                if !control(Control::Kill) {
                    return;
                }
            }
        })?;
    Ok(())
}

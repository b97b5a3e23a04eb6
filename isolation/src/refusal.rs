//! What a process says before a call that isn't listed ends it.

use std::sync::Once;

/// Offset of `si_syscall` in the kernel's `siginfo_t` on 64-bit machines.
const SI_SYSCALL: usize = 24;

/// Lets a refused call (SIGSYS) end the process with a line that says which it was.
pub fn report() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sigaction is plain data for which zeroes are valid; the handler makes
        // async-signal-safe system calls only. If this fails, the signal ends the process as well,
        // without the line.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
        }
    });
}

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, of 128 bytes.
    let number = unsafe {
        info.cast::<u8>()
            .add(SI_SYSCALL)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut line =
        *b"the system call .... is not on the list of the thread that made it: the process ends\n";
    let mut rest = number.unsigned_abs();
    for digit in line[16..20].iter_mut().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    // SAFETY: write and _exit may be called in a signal handler; the buffer lives through the call.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(1);
    }
}

//! A wall clock that is wrong, for one process: preloaded into a program (`LD_PRELOAD`), it has all reads of
//! `CLOCK_REALTIME` be off by the seconds that the file `KEELSON_CLOCK` says, and follows the file when it changes.
//!
//! Programs read clocks in the vDSO, some of them without the C library. So the vDSO's function is what is replaced, in
//! this process's own copy of its page, by a jump to one that asks the kernel. Other clocks stay right, and so does the
//! kernel's own use of this one: timers, time stamps of files.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

/// The seconds by which the clock is off, in the file's page, which is mapped.
static OFFSET: AtomicPtr<AtomicI64> = AtomicPtr::new(ptr::null_mut());

/// Called by the dynamic linker before the program begins.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    let Some(path) = std::env::var_os("KEELSON_CLOCK") else {
        return;
    };
    // A program whose clock is right makes the test fail.
    if let Err(error) = map(&path).and_then(|()| replace()) {
        eprintln!("the wall clock stays right: {error}");
    }
}

fn map(path: &std::ffi::OsStr) -> io::Result<()> {
    let file = File::open(path)?;
    let length = size_of::<AtomicI64>();
    // SAFETY: a new mapping, which stays.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    OFFSET.store(page.cast(), Ordering::Relaxed);
    Ok(())
}

/// Puts a jump to [`wrong_clock`] where the vDSO's function begins.
fn replace() -> io::Result<()> {
    let target = vdso_function(c"__vdso_clock_gettime")?;
    // mov rax, address; jmp rax: neither has arguments in there.
    let mut code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0];
    let function: extern "C" fn(libc::clockid_t, *mut libc::timespec) -> libc::c_int = wrong_clock;
    code[2..10].copy_from_slice(&(function as usize).to_le_bytes());
    // The page can't be written to in any other way; nothing else runs yet.
    let memory = OpenOptions::new().write(true).open("/proc/self/mem")?;
    memory.write_all_at(&code, target as u64)
}

fn vdso_function(name: &CStr) -> io::Result<usize> {
    let missing = |what| io::Error::new(io::ErrorKind::NotFound, what);
    // SAFETY: the vDSO is in every process, and its name a string.
    let vdso = unsafe {
        libc::dlopen(
            c"linux-vdso.so.1".as_ptr(),
            libc::RTLD_LAZY | libc::RTLD_NOLOAD,
        )
    };
    if vdso.is_null() {
        return Err(missing("there is no vDSO"));
    }
    // SAFETY: a handle that was just given, and a string.
    let function = unsafe { libc::dlsym(vdso, name.as_ptr()) };
    if function.is_null() {
        return Err(missing("the vDSO has no such function"));
    }
    Ok(function as usize)
}

extern "C" fn wrong_clock(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the caller's arguments, as they are; the kernel checks the pointer.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    let offset = OFFSET.load(Ordering::Relaxed);
    if result != 0 {
        // As the vDSO says it: the C library sets errno.
        return -errno();
    }
    if matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE) && !offset.is_null() {
        // SAFETY: the mapping stays, and the kernel has written to where `time` points.
        unsafe { (*time).tv_sec += (*offset).load(Ordering::Relaxed) };
    }
    0
}

fn errno() -> libc::c_int {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() }
}

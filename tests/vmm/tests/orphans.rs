//! A supervisor that is killed before the process in its jail has asked to end with it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{fs, ptr};

use keelson_vmm_tests::{GuestBuilder, wait_until};
use libc::{c_int, c_void, pid_t};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

const USER: u32 = 1_900_000_002;

/// A process that is killed when this is dropped.
struct Orphan(OwnedFd);

impl Orphan {
    fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut ended, Some(&now)).expect("a process can be polled") > 0
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        // It should have ended.
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }
}

fn ptrace(request: libc::c_uint, process: pid_t, data: usize) {
    // SAFETY: none of the requests that are used here writes through its data but GETEVENTMSG and GETREGS, whose
    // callers give a place for that.
    let result = unsafe { libc::ptrace(request, process, ptr::null_mut::<c_void>(), data) };
    let error = io::Error::last_os_error();
    assert!(result == 0, "ptrace request {request}: {error}");
}

/// Waits for the next stop of a traced process; its status.
fn stopped(process: pid_t) -> c_int {
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    let waited = unsafe { libc::waitpid(process, &raw mut status, libc::__WALL) };
    assert!(waited == process && libc::WIFSTOPPED(status), "{status:#x}");
    status
}

/// The process that a traced one forks.
fn fork_of(supervisor: pid_t) -> pid_t {
    stopped(supervisor);
    let options = libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
    ptrace(
        libc::PTRACE_SETOPTIONS,
        supervisor,
        usize::try_from(options).expect("positive"),
    );
    loop {
        ptrace(libc::PTRACE_CONT, supervisor, 0);
        if stopped(supervisor) >> 16 == libc::PTRACE_EVENT_FORK {
            break;
        }
    }
    let mut process: libc::c_ulong = 0;
    ptrace(
        libc::PTRACE_GETEVENTMSG,
        supervisor,
        (&raw mut process) as usize,
    );
    let process = pid_t::try_from(process).expect("a process id");
    stopped(process);
    process
}

/// Lets a traced process run to where it is about to ask for the `nth` time to end with its parent.
fn run_to_request(process: pid_t, nth: usize) {
    let mut asked = 0;
    let mut entering = false;
    while asked < nth {
        ptrace(libc::PTRACE_SYSCALL, process, 0);
        if libc::WSTOPSIG(stopped(process)) != libc::SIGTRAP | 0x80 {
            continue;
        }
        entering = !entering;
        // SAFETY: a struct of integers.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETREGS, process, (&raw mut registers) as usize);
        let call = i64::try_from(registers.orig_rax);
        let asks = call == Ok(libc::SYS_prctl)
            && c_int::try_from(registers.rdi) == Ok(libc::PR_SET_PDEATHSIG);
        asked += usize::from(entering && asks);
    }
}

fn orphaned_before_request(nth: usize) {
    let builder = GuestBuilder::new("hang");
    let log = builder.directory().join("log");
    fs::create_dir(&log).expect("a folder can be made");
    chown(&log, Some(USER), Some(USER)).expect("root can give it away");
    let builder = builder
        .set(
            "/console/log",
            log.join("console.log").display().to_string(),
        )
        .argument("--jail")
        .argument(&format!("{USER}:{USER}"));
    let guest = builder.start_as(|command: &mut Command| {
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe {
            command.pre_exec(|| {
                let nothing = ptr::null_mut::<c_void>();
                match libc::ptrace(libc::PTRACE_TRACEME, 0, nothing, nothing) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
    });
    let supervisor = pid_t::try_from(guest.process_id()).expect("a process id");
    let inside = fork_of(supervisor);
    let pid = Pid::from_raw(inside).expect("not zero");
    let orphan = Orphan(pidfd_open(pid, PidfdFlags::empty()).expect("it is there"));
    run_to_request(inside, nth);
    guest.signal(Signal::KILL);
    let supervisor = libc::id_t::try_from(supervisor).expect("a process id");
    // SAFETY: all zeros are a siginfo_t, and the pointer is to it. The process is left to be waited for by its owner.
    let waited = unsafe {
        let mut ended: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOWAIT;
        libc::waitid(libc::P_PID, supervisor, &raw mut ended, options)
    };
    assert_eq!(waited, 0);
    assert!(!orphan.has_ended(), "it stands still");
    ptrace(libc::PTRACE_DETACH, inside, 0);
    wait_until("end of the process in the jail", || {
        orphan.has_ended().then_some(())
    });
}

#[test]
fn a_jail_whose_supervisor_was_killed_at_once_ends() {
    orphaned_before_request(1);
}

/// The change of the user has made the kernel forget what it was asked before.
#[test]
fn a_jail_whose_supervisor_was_killed_while_it_was_entered_ends() {
    orphaned_before_request(2);
}

//! One thread for each vCPU, and how they are stopped.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{ExitHandler, Vcpu, VcpuEnd};

/// How often a stop signal is repeated: one that arrives between the check of the flag and
/// KVM_RUN is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Where a vCPU's end goes.
pub type EndReporter = Arc<dyn Fn(VcpuEnd) + Send + Sync>;

/// Lets the signal that stops a vCPU interrupt KVM_RUN and do nothing else. Once a process.
pub fn install_kick_signal() -> io::Result<()> {
    extern "C" fn interrupt_only(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt_only)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// The running vCPUs. Dropping stops and joins them.
pub struct VcpuThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts `vcpus`; each tells `report` when it ends by itself.
    pub fn start(
        vcpus: Vec<Vcpu>,
        handler: &Arc<dyn ExitHandler>,
        report: &EndReporter,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut started = Self {
            stop: Arc::clone(&stop),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for mut vcpu in vcpus {
            let handler = Arc::clone(handler);
            let report = Arc::clone(report);
            let stop = Arc::clone(&stop);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{}", vcpu.index()))
                .spawn(move || {
                    let end = vcpu.run(&*handler, &|| stop.load(Ordering::Acquire));
                    if end != VcpuEnd::Stopped {
                        report(end);
                    }
                })?;
            started.threads.push(thread);
        }
        Ok(started)
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                // SAFETY: the thread is not joined yet, so its id is valid; the signal's handler
                // does nothing.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
                std::thread::sleep(KICK_INTERVAL);
            }
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

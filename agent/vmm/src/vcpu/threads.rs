//! One thread for each vCPU, and how they are paused and stopped.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{ExitHandler, Vcpu, VcpuEnd};
use crate::isolation::seccomp::{self, Mode, Thread};

/// How often a signal is repeated: one that arrives between the check of the order and KVM_RUN is
/// lost.
const KICK_INTERVAL: Duration = Duration::from_micros(200);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// Where a vCPU's end goes.
pub type EndReporter = Arc<dyn Fn(VcpuEnd) + Send + Sync>;

/// Lets the signal that stops a vCPU interrupt KVM_RUN and do nothing else. Once a process.
pub fn install_kick_signal() -> io::Result<()> {
    extern "C" fn interrupt_only(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt_only)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// What the threads are to do, and how many of them don't run the guest.
struct Orders {
    order: AtomicU8,
    parked: Mutex<usize>,
    changed: Condvar,
}

/// The vCPUs. Dropping stops and joins them.
pub struct VcpuThreads {
    orders: Arc<Orders>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Makes a thread for each of `vcpus`, all paused; each tells `report` when it ends by itself.
    pub fn start(
        vcpus: Vec<Vcpu>,
        handler: &Arc<dyn ExitHandler>,
        report: &EndReporter,
        pinning: &[Vec<u16>],
        seccomp: Mode,
    ) -> io::Result<Self> {
        let mut started = Self {
            orders: Arc::new(Orders {
                order: AtomicU8::new(PAUSE),
                parked: Mutex::new(0),
                changed: Condvar::new(),
            }),
            threads: Vec::with_capacity(vcpus.len()),
            vcpus: Vec::with_capacity(vcpus.len()),
        };
        for vcpu in vcpus {
            let name = format!("vcpu{}", vcpu.index());
            let vcpu = Arc::new(Mutex::new(vcpu));
            started.vcpus.push(Arc::clone(&vcpu));
            let handler = Arc::clone(handler);
            let report = Arc::clone(report);
            let orders = Arc::clone(&started.orders);
            let cpus = pinning.get(started.threads.len()).cloned();
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let ready = pin(cpus.as_deref()).and_then(|()| {
                    seccomp::apply(Thread::Vcpu, seccomp).map_err(|e| e.to_string())
                });
                match ready {
                    Ok(()) => serve(&vcpu, &orders, &*handler, &report),
                    Err(e) => {
                        *orders.parked() += 1;
                        report(VcpuEnd::Error(e));
                    }
                }
            })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.orders.give(RUN);
    }

    /// Stops the guest; when this returns no vCPU runs, and none has an access half done.
    pub fn pause(&self) {
        self.orders.give(PAUSE);
        let mut parked = self.orders.parked();
        while *parked < self.threads.len() {
            for thread in &self.threads {
                kick(thread);
            }
            parked = self
                .orders
                .changed
                .wait_timeout(parked, KICK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The vCPUs, to be looked at while they are paused.
    pub fn vcpus(&self) -> impl Iterator<Item = MutexGuard<'_, Vcpu>> {
        self.vcpus
            .iter()
            .map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Orders {
    fn give(&self, order: u8) {
        let parked = self.parked();
        self.order.store(order, Ordering::Release);
        drop(parked);
        self.changed.notify_all();
    }

    fn now(&self) -> u8 {
        self.order.load(Ordering::Acquire)
    }

    fn parked(&self) -> MutexGuard<'_, usize> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the order is to pause; returns the order.
    fn wait(&self) -> u8 {
        let mut parked = self.parked();
        *parked += 1;
        self.changed.notify_all();
        while self.now() == PAUSE {
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
        self.now()
    }
}

fn serve(vcpu: &Mutex<Vcpu>, orders: &Orders, handler: &dyn ExitHandler, report: &EndReporter) {
    while orders.wait() == RUN {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let end = vcpu.run(handler, &|| orders.now() != RUN);
        drop(vcpu);
        if end != VcpuEnd::Stopped {
            report(end);
            // The guest's end: this vCPU counts as one that doesn't run.
            *orders.parked() += 1;
            return;
        }
    }
}

/// Lets the calling thread run on these processors of the host only.
fn pin(cpus: Option<&[u16]>) -> Result<(), String> {
    let Some(cpus) = cpus else {
        return Ok(());
    };
    // SAFETY: an all-zero set is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        let cpu = usize::from(*cpu);
        if cpu >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(format!("cpu.pinning: this host has no processor {cpu}"));
        }
        // SAFETY: the set has a bit for the processor.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the pointer and size are those of `set`.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(format!(
        "cpu.pinning: a vCPU can't run on the processors {cpus:?} of this host: {error}"
    ))
}

fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread is not joined yet, so its id is valid; the signal's handler does nothing.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.orders.give(STOP);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                kick(&thread);
                std::thread::sleep(KICK_INTERVAL);
            }
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

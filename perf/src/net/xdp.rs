//! XDP programs of a few instructions, run by hand (bpf(2)).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;

/// `r0 = XDP_PASS; exit`
pub const PASS: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
/// Frames that go up the stack together, as of one poll of a driver (`NAPI_POLL_WEIGHT`).
const BATCH: u32 = 64;
/// `BPF_PROG_LOAD` and `BPF_PROG_RUN`, commands of bpf(2).
const LOAD: libc::c_int = 5;
const RUN: libc::c_int = 10;
/// `BPF_PROG_TYPE_XDP`.
const XDP: u32 = 6;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`.
const LIVE_FRAMES: u32 = 2;

/// A loaded program.
#[derive(Debug)]
pub struct Program(OwnedFd);

impl Program {
    /// Loads instructions (`struct bpf_insn`).
    pub fn load(instructions: &[u64]) -> io::Result<Self> {
        let mut attributes = LoadAttributes {
            program_type: XDP,
            instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: instructions.as_ptr().expose_provenance() as u64,
            license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
            ..LoadAttributes::default()
        };
        let program = bpf(LOAD, &mut attributes)?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(program) }))
    }

    /// Runs it `count` times on a frame; how long that took. If a device is given by its index, what the program lets
    /// pass the device seems to have received (Linux, Documentation/bpf/bpf_prog_run.rst).
    pub fn run(&self, frame: &[u8], count: u32, device: Option<u32>) -> io::Result<Duration> {
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        let context = Context {
            data_end: length,
            ingress_ifindex: device.unwrap_or(0),
            ..Context::default()
        };
        let mut attributes = RunAttributes {
            program: self.0.as_raw_fd().cast_unsigned(),
            data_in_length: length,
            data_in: frame.as_ptr().expose_provenance() as u64,
            repeat: count,
            context_in_length: u32::try_from(size_of::<Context>()).map_err(io::Error::other)?,
            context_in: (&raw const context).expose_provenance() as u64,
            ..RunAttributes::default()
        };
        if device.is_some() {
            attributes.flags = LIVE_FRAMES;
            attributes.batch_size = BATCH;
        }
        bpf(RUN, &mut attributes)?;
        Ok(Duration::from_nanos(attributes.duration.into()) * count)
    }

    /// Nanoseconds of a run by the kernel's statistics, as far as it kept them.
    pub fn counted_ns(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let field = |name: &str| -> anyhow::Result<f64> {
            let value = text.lines().find_map(|line| line.strip_prefix(name));
            let value = value.with_context(|| format!("{name} of a program"))?;
            Ok(value.trim().parse()?)
        };
        Ok(field("run_time_ns:")? / field("run_cnt:")?.max(1.0))
    }
}

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Debug, Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` for `BPF_PROG_RUN`.
#[repr(C)]
#[derive(Debug, Default)]
struct RunAttributes {
    program: u32,
    result: u32,
    data_in_length: u32,
    data_out_length: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_length: u32,
    context_out_length: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// `struct xdp_md`.
#[repr(C)]
#[derive(Debug, Default)]
struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// bpf(2).
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes are integers of the size given, whose results the kernel may write; what they point at
    // lives through the call and is only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    match libc::c_int::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;

use crate::moved_flows::BadFlow;

/// Everything that this crate's calls can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatapathError {
    /// The process may not use BPF.
    #[error(
        "the kernel does not permit {action}: run as root, or with CAP_BPF and CAP_NET_ADMIN \
         (and CAP_SYS_ADMIN to mount the BPF file system)"
    )]
    NotPermitted {
        /// What was tried.
        action: String,
    },
    /// The kernel was built without the bpf system call.
    #[error(
        "this kernel has no BPF: use one with CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and \
         CONFIG_NET_SCH_INGRESS, as distributions build it"
    )]
    BpfUnavailable,
    /// The kernel lacks something that the programs need.
    #[error("Linux {found} is too old for {needs}: use {required} or later")]
    KernelTooOld {
        /// The running kernel's version.
        found: String,
        /// The oldest version that will do.
        required: &'static str,
        /// What needs it.
        needs: &'static str,
    },
    /// The pin root is not in a BPF file system and none can be mounted.
    #[error(
        "no BPF file system at {path}: {problem}; mount one with `mount -t bpf bpf /sys/fs/bpf`"
    )]
    BpffsUnavailable {
        /// Where it was looked for.
        path: PathBuf,
        /// What was found instead.
        problem: String,
    },
    /// A folder or file of the pin root can't be made, read or removed.
    #[error("cannot {action} {path}: {source}")]
    Pin {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process has the pin root open.
    #[error("another process uses the datapath at {path}: stop it first, only one agent may run")]
    InUse {
        /// The pin root.
        path: PathBuf,
    },
    /// The pinned maps are a later version's, or one's from before there were releases.
    #[error(
        "the maps pinned at {path} have layout {found}, this version knows those up to {expected}: install \
         the version that made them, or stop the guests, remove the folder and start the agent again"
    )]
    LayoutMismatch {
        /// The pin root.
        path: PathBuf,
        /// The pinned maps' version.
        found: u64,
        /// This library's version.
        expected: u64,
    },
    /// The kernel refused the object; a defect, or a kernel that was never tried.
    #[error("the kernel does not accept {what}: {problem}")]
    Load {
        /// A program or map.
        what: String,
        /// The kernel's or the verifier's words.
        problem: String,
    },
    /// No interface has this name.
    #[error("there is no network interface {interface:?}: create the TAP device first")]
    InterfaceMissing {
        /// The name.
        interface: String,
    },
    /// The interface has no policy.
    #[error("no policy is attached to the network interface {interface:?}")]
    NotAttached {
        /// The name.
        interface: String,
    },
    /// A hook can't be attached or detached.
    #[error(
        "cannot {action} the {mode} hook {program} of the network interface {interface:?}: {problem}"
    )]
    Hook {
        /// attach, replace or detach.
        action: &'static str,
        /// tcx or clsact.
        mode: &'static str,
        /// The program's name.
        program: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's answer.
        problem: String,
    },
    /// The policy contradicts itself.
    #[error("the policy of interface {interface:?} is wrong in {field}: {problem}")]
    InvalidPolicy {
        /// The interface.
        interface: String,
        /// The field, such as `ingress[3].ports`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A service contradicts itself or another.
    #[error("the service {service} {problem}")]
    InvalidService {
        /// Its address, protocol and port.
        service: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Source NAT or a forwarded port contradicts itself or another.
    #[error("the {what} {problem}")]
    InvalidNat {
        /// The network and uplink, or the forwarded port.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A guest that came from another host brought what is no flow.
    #[error("a flow that came with the guest of interface {interface:?} is refused: {problem}")]
    BadFlow {
        /// The interface.
        interface: String,
        /// What is wrong with it.
        problem: BadFlow,
    },
    /// A map has no room left.
    #[error("the map {map} is full: fewer interfaces or rules fit on one host")]
    Full {
        /// The map.
        map: &'static str,
    },
    /// A map can't be read or written.
    #[error("cannot {action} the map {map}: {source}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        source: MapError,
    },
}

impl DatapathError {
    /// Turns a map operation's error into ours.
    pub(crate) fn map(action: &'static str, map: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| match map_errno(&source) {
            // A hash map says E2BIG when full, a trie ENOSPC; ENOMEM without preallocation.
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => Self::Full { map },
            _ => Self::Map {
                action,
                map,
                source,
            },
        }
    }
}

fn map_errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        MapError::CreateError { io_error, .. } => io_error.raw_os_error(),
        _ => None,
    }
}

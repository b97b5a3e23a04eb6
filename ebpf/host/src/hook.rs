//! Attaches programs to an interface's ingress and egress: by pinned TCX links where the kernel has
//! them (6.6 and later), else by filters of the clsact qdisc, which stay by themselves.

use std::io;
use std::mem;
use std::path::Path;
use std::time::Duration;

use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, tc};
use aya::sys::SyscallError;
use aya::util::KernelVersion;
use keelson_ebpf_common::program_name;

use crate::error::DatapathError;
use crate::interface;
use crate::kernel;
use crate::object::{Object, chain};
use crate::pin_root::{self, PinRoot};

/// Priority and handle of our clsact filters: first in line, with a handle that others don't use.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x4b45);

/// How long a link that nobody holds any more may stay attached: the kernel lets go of it after an RCU
/// grace period, on a busy machine some tenths of a second later.
const LINK_END_TRIES: u32 = 500;
const LINK_END_PAUSE: Duration = Duration::from_millis(10);

/// Which hooks to use for interfaces that are attached from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HookChoice {
    /// TCX where the kernel has it, else clsact.
    #[default]
    Auto,
    /// TCX, Linux 6.6 and later.
    Tcx,
    /// The clsact qdisc.
    Clsact,
}

/// How an interface's programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookMode {
    /// TCX links.
    Tcx,
    /// Filters of the clsact qdisc.
    Clsact,
}

impl HookMode {
    /// "tcx" or "clsact".
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    pub(crate) const fn to_byte(self) -> u8 {
        match self {
            Self::Tcx => 1,
            Self::Clsact => 2,
        }
    }

    pub(crate) const fn from_byte(byte: u8) -> Self {
        if byte == 1 { Self::Tcx } else { Self::Clsact }
    }
}

impl std::fmt::Display for HookMode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Decides which hooks this kernel gets.
pub fn choose(choice: HookChoice) -> Result<HookMode, DatapathError> {
    let has_tcx = kernel::is_at_least(KernelVersion::new(6, 6, 0));
    match choice {
        HookChoice::Clsact => Ok(HookMode::Clsact),
        HookChoice::Auto if !has_tcx => Ok(HookMode::Clsact),
        HookChoice::Tcx if !has_tcx => Err(DatapathError::KernelTooOld {
            found: kernel::release(),
            required: "6.6",
            needs: "TCX hooks (clsact works on older ones)",
        }),
        HookChoice::Auto | HookChoice::Tcx => Ok(HookMode::Tcx),
    }
}

/// An interface whose hooks are meant.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub name: &'a str,
    pub ifindex: u32,
    pub mode: HookMode,
    pub hooks: &'a [Hook],
}

/// A program at one of an interface's hooks.
#[derive(Clone, Copy)]
pub struct Hook {
    program: &'static str,
    at: TcAttachType,
}

/// A guest's interface: toward the guest first. What the guest sends is what its device receives.
pub const GUEST_HOOKS: [Hook; 2] = [
    Hook {
        program: program_name::TO_GUEST,
        at: TcAttachType::Egress,
    },
    Hook {
        program: program_name::FROM_GUEST,
        at: TcAttachType::Ingress,
    },
];

/// A network's bridge: answers first.
pub const GATEWAY_HOOKS: [Hook; 2] = [
    Hook {
        program: program_name::SERVICE_TO_HOST,
        at: TcAttachType::Ingress,
    },
    Hook {
        program: program_name::SERVICE_FROM_HOST,
        at: TcAttachType::Egress,
    },
];

/// A host's uplink: what comes in first, so that no answer finds nobody.
pub const UPLINK_HOOKS: [Hook; 2] = [
    Hook {
        program: program_name::FROM_UPLINK,
        at: TcAttachType::Ingress,
    },
    Hook {
        program: program_name::TO_UPLINK,
        at: TcAttachType::Egress,
    },
];

/// The tunnel's device: what other hosts send. What is sent by it, guests' programs decided about.
pub const TUNNEL_HOOKS: [Hook; 1] = [Hook {
    program: program_name::FROM_TUNNEL,
    at: TcAttachType::Ingress,
}];

/// What became of hooks that the interface should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooks {
    /// The programs run, and are those of this process.
    InForce,
    /// A hook is not there.
    Missing,
    /// A TCX link is left of an interface that is gone, whatever has its index now.
    Dead,
}

/// Replaces programs in place and attaches those that are not attached. `Dead` changes nothing.
pub fn ensure(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
) -> Result<Hooks, DatapathError> {
    for &hook in target.hooks {
        match replace_one(object, root, target, hook)? {
            Hooks::InForce => {}
            Hooks::Missing => attach_one(object, root, target, hook)?,
            Hooks::Dead => return Ok(Hooks::Dead),
        }
    }
    Ok(Hooks::InForce)
}

/// As [`ensure`]; links that are left of an earlier interface with this index are removed first.
pub fn ensure_anew(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
) -> Result<(), DatapathError> {
    if ensure(object, root, target)? == Hooks::Dead {
        remove_links(root, target.ifindex)?;
        ensure(object, root, target)?;
    }
    Ok(())
}

fn attach_one(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
    hook: Hook,
) -> Result<(), DatapathError> {
    let name = hook.program;
    let path = root.link(target.ifindex, name);
    let program = object.program(name)?;
    let result = match target.mode {
        HookMode::Tcx => attach_tcx(program, target.name, hook, &path),
        HookMode::Clsact => attach_clsact(program, target.name, hook),
    };
    result.map_err(|problem| hook_error("attach", target, name, problem))
}

fn attach_tcx(
    program: &mut SchedClassifier,
    interface: &str,
    hook: Hook,
    path: &Path,
) -> Result<(), String> {
    let mut tries = LINK_END_TRIES;
    let id = loop {
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        match program.attach_with_options(interface, hook.at, options) {
            Ok(id) => break id,
            // The program is attached by a link whose file was removed: the kernel ends it in its own time.
            Err(error) if tries > 0 && is_attached_already(&error) => {
                tries -= 1;
                std::thread::sleep(LINK_END_PAUSE);
            }
            Err(error) => return Err(chain(&error)),
        }
    };
    let link = program.take_link(id).map_err(|error| chain(&error))?;
    let link = FdLink::try_from(link).map_err(|error| chain(&error))?;
    link.pin(path).map(drop).map_err(|error| chain(&error))
}

fn is_attached_already(error: &ProgramError) -> bool {
    let ProgramError::SyscallError(error) = error else {
        return false;
    };
    error.io_error.raw_os_error() == Some(libc::EEXIST)
}

fn attach_clsact(program: &mut SchedClassifier, interface: &str, hook: Hook) -> Result<(), String> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => {}
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(chain(&error)),
    }
    let options = NlOptions {
        priority: FILTER_PRIORITY,
        handle: FILTER_HANDLE,
        classid: None,
    };
    let id = program
        .attach_with_options(interface, hook.at, TcAttachOptions::Netlink(options))
        .map_err(|error| chain(&error))?;
    let link = program.take_link(id).map_err(|error| chain(&error))?;
    leave_attached(link);
    Ok(())
}

/// A filter stays in the kernel by itself, but its link would detach it when dropped. It owns
/// nothing else.
fn leave_attached(link: SchedClassifierLink) {
    mem::forget(link);
}

/// Replaces the programs in place.
pub fn replace(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
) -> Result<Hooks, DatapathError> {
    for &hook in target.hooks {
        match replace_one(object, root, target, hook)? {
            Hooks::InForce => {}
            other => return Ok(other),
        }
    }
    Ok(Hooks::InForce)
}

fn replace_one(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
    hook: Hook,
) -> Result<Hooks, DatapathError> {
    let name = hook.program;
    let program = object.program(name)?;
    match target.mode {
        HookMode::Tcx => replace_tcx(program, &root.link(target.ifindex, name)),
        HookMode::Clsact => replace_clsact(program, target.name, hook),
    }
    .map_err(|problem| hook_error("replace", target, name, problem))
}

fn replace_tcx(program: &mut SchedClassifier, path: &Path) -> Result<Hooks, String> {
    let pinned = match PinnedLink::from_pin(path) {
        Ok(pinned) => pinned,
        Err(LinkError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            return Ok(Hooks::Missing);
        }
        Err(error) => return Err(chain(&error)),
    };
    let link =
        SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(|error| chain(&error))?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // Dropping the link closes a file descriptor; the pinned file keeps it attached.
            program
                .take_link(id)
                .map(drop)
                .map_err(|error| chain(&error))?;
            Ok(Hooks::InForce)
        }
        // The link of an interface that is gone.
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::ENOLINK) =>
        {
            Ok(Hooks::Dead)
        }
        Err(error) => Err(chain(&error)),
    }
}

fn replace_clsact(
    program: &mut SchedClassifier,
    interface: &str,
    hook: Hook,
) -> Result<Hooks, String> {
    let Some(link) = filter(interface, hook)? else {
        return Ok(Hooks::Missing);
    };
    match program.attach_to_link(link) {
        Ok(id) => {
            leave_attached(program.take_link(id).map_err(|error| chain(&error))?);
            Ok(Hooks::InForce)
        }
        Err(ProgramError::TcError(TcError::NetlinkError(error)))
            if is_missing_filter(error.raw_os_error()) =>
        {
            Ok(Hooks::Missing)
        }
        Err(error) => Err(chain(&error)),
    }
}

/// Our filter of an interface; `None` if there is no such interface.
fn filter(interface: &str, hook: Hook) -> Result<Option<SchedClassifierLink>, String> {
    let link =
        SchedClassifierLink::attached(interface, hook.at, FILTER_PRIORITY, FILTER_HANDLE, None);
    match link {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(chain(&error)),
    }
}

/// No filter, no qdisc (EINVAL), no interface.
fn is_missing_filter(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENOENT | libc::EINVAL | libc::ENODEV))
}

/// Detaches the programs; that one isn't attached is fine.
pub fn detach(root: &PinRoot, target: Target<'_>) -> Result<(), DatapathError> {
    for &hook in target.hooks {
        let name = hook.program;
        match target.mode {
            // The link ends with its last reference, the file.
            HookMode::Tcx => pin_root::remove(&root.link(target.ifindex, name))?,
            HookMode::Clsact => detach_clsact(target.name, hook)
                .map_err(|problem| hook_error("detach", target, name, problem))?,
        }
    }
    Ok(())
}

/// As [`detach`]; of an interface that is gone, or whose index another one has, these links are removed.
pub fn forget(root: &PinRoot, target: Target<'_>) -> Result<(), DatapathError> {
    if interface::name(target.ifindex).as_deref() == Some(target.name) {
        return detach(root, target);
    }
    for &hook in target.hooks {
        remove_link(root, target.ifindex, hook)?;
    }
    Ok(())
}

fn detach_clsact(interface: &str, hook: Hook) -> Result<(), String> {
    use aya::programs::Link as _;

    let Some(link) = filter(interface, hook)? else {
        return Ok(());
    };
    match link.detach() {
        Err(ProgramError::NetlinkError(error)) if !is_missing_filter(error.raw_os_error()) => {
            Err(chain(&error))
        }
        _ => Ok(()),
    }
}

/// Removes the links of an interface that has no policy: a detach was cut short.
pub fn remove_links(root: &PinRoot, ifindex: u32) -> Result<(), DatapathError> {
    let hooks = GUEST_HOOKS.into_iter().chain(GATEWAY_HOOKS);
    for hook in hooks.chain(UPLINK_HOOKS).chain(TUNNEL_HOOKS) {
        remove_link(root, ifindex, hook)?;
    }
    Ok(())
}

fn remove_link(root: &PinRoot, ifindex: u32, hook: Hook) -> Result<(), DatapathError> {
    pin_root::remove(&root.link(ifindex, hook.program))
}

fn hook_error(
    action: &'static str,
    target: Target<'_>,
    program: &'static str,
    problem: String,
) -> DatapathError {
    DatapathError::Hook {
        action,
        mode: target.mode.as_str(),
        program,
        interface: target.name.to_owned(),
        problem,
    }
}

//! Attaches programs to an interface's ingress and egress: by pinned TCX links where the kernel has
//! them (6.6 and later), else by filters of the clsact qdisc, which stay by themselves.

use std::io;
use std::mem;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, tc};
use aya::sys::SyscallError;
use aya::util::KernelVersion;
use keelson_ebpf_common::{Direction, program_name};

use crate::error::DatapathError;
use crate::kernel;
use crate::object::{Object, chain};
use crate::pin_root::{self, PinRoot};

/// Priority and handle of our clsact filters: first in line, with a handle that others don't use.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x4b45);

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
}

/// Both hooks in the order in which they are attached: toward the guest first.
const HOOKS: [Direction; 2] = [Direction::ToGuest, Direction::FromGuest];

const fn program_of(direction: Direction) -> &'static str {
    match direction {
        Direction::FromGuest => program_name::FROM_GUEST,
        Direction::ToGuest => program_name::TO_GUEST,
    }
}

/// What the guest sends is what the TAP device receives.
const fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::FromGuest => TcAttachType::Ingress,
        Direction::ToGuest => TcAttachType::Egress,
    }
}

/// What became of hooks that the interface should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooks {
    /// Both programs run, and are those of this process.
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
    for direction in HOOKS {
        match replace_one(object, root, target, direction)? {
            Hooks::InForce => {}
            Hooks::Missing => attach_one(object, root, target, direction)?,
            Hooks::Dead => return Ok(Hooks::Dead),
        }
    }
    Ok(Hooks::InForce)
}

fn attach_one(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
    direction: Direction,
) -> Result<(), DatapathError> {
    let name = program_of(direction);
    let path = root.link(target.ifindex, name);
    let program = object.program(name)?;
    let result = match target.mode {
        HookMode::Tcx => attach_tcx(program, target.name, direction, &path),
        HookMode::Clsact => attach_clsact(program, target.name, direction),
    };
    result.map_err(|problem| hook_error("attach", target, name, problem))
}

fn attach_tcx(
    program: &mut SchedClassifier,
    interface: &str,
    direction: Direction,
    path: &Path,
) -> Result<(), String> {
    let id = program
        .attach_with_options(
            interface,
            attach_type(direction),
            TcAttachOptions::TcxOrder(LinkOrder::first()),
        )
        .map_err(|error| chain(&error))?;
    let link = program.take_link(id).map_err(|error| chain(&error))?;
    let link = FdLink::try_from(link).map_err(|error| chain(&error))?;
    link.pin(path).map(drop).map_err(|error| chain(&error))
}

fn attach_clsact(
    program: &mut SchedClassifier,
    interface: &str,
    direction: Direction,
) -> Result<(), String> {
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
        .attach_with_options(
            interface,
            attach_type(direction),
            TcAttachOptions::Netlink(options),
        )
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

/// Replaces both programs in place.
pub fn replace(
    object: &mut Object,
    root: &PinRoot,
    target: Target<'_>,
) -> Result<Hooks, DatapathError> {
    for direction in HOOKS {
        match replace_one(object, root, target, direction)? {
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
    direction: Direction,
) -> Result<Hooks, DatapathError> {
    let name = program_of(direction);
    let program = object.program(name)?;
    match target.mode {
        HookMode::Tcx => replace_tcx(program, &root.link(target.ifindex, name)),
        HookMode::Clsact => replace_clsact(program, target.name, direction),
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
    direction: Direction,
) -> Result<Hooks, String> {
    let Some(link) = filter(interface, direction)? else {
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
fn filter(interface: &str, direction: Direction) -> Result<Option<SchedClassifierLink>, String> {
    let link = SchedClassifierLink::attached(
        interface,
        attach_type(direction),
        FILTER_PRIORITY,
        FILTER_HANDLE,
        None,
    );
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

/// Detaches both programs; that one isn't attached is fine.
pub fn detach(root: &PinRoot, target: Target<'_>) -> Result<(), DatapathError> {
    for direction in HOOKS {
        let name = program_of(direction);
        match target.mode {
            // The link ends with its last reference, the file.
            HookMode::Tcx => pin_root::remove(&root.link(target.ifindex, name))?,
            HookMode::Clsact => detach_clsact(target.name, direction)
                .map_err(|problem| hook_error("detach", target, name, problem))?,
        }
    }
    Ok(())
}

fn detach_clsact(interface: &str, direction: Direction) -> Result<(), String> {
    use aya::programs::Link as _;

    let Some(link) = filter(interface, direction)? else {
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
    for direction in HOOKS {
        pin_root::remove(&root.link(ifindex, program_of(direction)))?;
    }
    Ok(())
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

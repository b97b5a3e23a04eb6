//! The running kernel's version.

use aya::util::KernelVersion;

/// Whether it is `version` or later; a kernel that doesn't say is taken for a new one.
pub fn is_at_least(version: KernelVersion) -> bool {
    KernelVersion::current().map_or(true, |current| current >= version)
}

/// As `uname -r` prints it.
pub fn release() -> String {
    let uname = rustix::system::uname();
    uname.release().to_string_lossy().into_owned()
}

//! The user that a guest's virtual machine runs as, and what it owns.

use std::fmt;
use std::os::unix::fs::chown;
use std::path::Path;

use keelson_api::DiskSpec;

use super::GuestPaths;
use crate::{AgentError, error::Result};

/// Users above those that systemd gives to containers ("Users, Groups, UIDs and GIDs on systemd
/// Systems"), of which nobody else knows.
const FIRST: u32 = 1_879_048_192;
/// How many: a power of two.
const COUNT: u32 = 1 << 28;

/// The user, and group of the same number, of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JailUser(u32);

impl JailUser {
    /// The user of the guest `name`, the same on every host (FNV-1a).
    pub fn of(name: &str) -> Self {
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        // The high bits are mixed best; fold them in.
        Self(FIRST + ((hash >> 28) ^ hash) % COUNT)
    }

    /// Gives it the folder of the guest's logs, which it rotates, and its disks' sockets.
    pub fn take_over(self, paths: &GuestPaths, disks: &[(String, DiskSpec)]) -> Result<()> {
        let log = paths.console_log();
        self.own(log.parent().unwrap_or(&log))?;
        if log.exists() {
            self.own(&log)?;
        }
        disks
            .iter()
            .try_for_each(|(disk, _)| self.own_socket(paths, disk))
    }

    /// Gives it the socket of a disk's backend, which has just been made.
    pub fn own_socket(self, paths: &GuestPaths, disk: &str) -> Result<()> {
        self.own(&paths.disk_socket(disk))
    }

    /// Gives it one file or folder.
    pub fn own(self, path: &Path) -> Result<()> {
        let Self(id) = self;
        chown(path, Some(id), Some(id)).map_err(AgentError::io(format!(
            "give {} to the guest's user {id}",
            path.display()
        )))
    }
}

/// `UID:GID`, as keelson-vmm takes it.
impl fmt::Display for JailUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{0}:{0}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_have_users_of_their_own() {
        let (web, db) = (JailUser::of("web"), JailUser::of("db"));
        assert_ne!(web, db);
        assert_eq!(web, JailUser::of("web"));
        for JailUser(id) in [web, db] {
            assert!((FIRST..FIRST + COUNT).contains(&id));
        }
    }
}

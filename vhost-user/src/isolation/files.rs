//! Which files threads may open and change.

use std::path::Path;

use keelson_isolation::{AllowedPaths, RestrictError};

use super::Role;

/// What name resolution and TLS read, where it is there.
const NETWORK_FILES: [&str; 12] = [
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/pki",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl",
    "/lib",
    "/run/systemd/resolve",
    "/usr/lib",
    "/usr/share/ca-certificates",
];

/// Leaves the calling thread what its role opens. False if the kernel has no Landlock.
pub(super) fn restrict(role: Role, paths: &AllowedPaths) -> Result<bool, RestrictError> {
    let mut allowed = AllowedPaths::default();
    if role.opens_files() {
        allowed.clone_from(paths);
        for file in NETWORK_FILES {
            allowed.allow_read(Path::new(file));
        }
    }
    allowed.enforce()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::ErrorKind;
    use std::thread;

    use super::*;

    #[test]
    fn those_who_serve_guests_open_nothing_and_the_others_what_was_named() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut paths = AllowedPaths::default();
        paths.allow(folder.path());
        let made = |role: Role, name: &str| {
            let (paths, path) = (paths.clone(), folder.path().join(name));
            // The restriction ends with the thread.
            let thread = thread::spawn(move || {
                assert!(
                    restrict(role, &paths).unwrap(),
                    "this kernel has no Landlock (lsm=), so nothing can be tested"
                );
                let resolved = File::open("/etc/hosts").err().map(|error| error.kind());
                let made = File::create(path).err().map(|error| error.kind());
                (made, resolved)
            });
            thread.join().unwrap()
        };
        let denied = Some(ErrorKind::PermissionDenied);
        for role in [Role::Worker, Role::Layer, Role::Disk, Role::Signals] {
            assert_eq!(made(role, "serves"), (denied, denied), "{role:?}");
        }
        for role in [Role::Control, Role::Fetch, Role::Starter] {
            let (made, resolved) = made(role, "opens");
            assert_eq!(made, None, "{role:?}");
            assert_ne!(resolved, denied, "{role:?}");
        }
    }
}

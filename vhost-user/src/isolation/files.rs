//! Which files threads may open and change, by Landlock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

use super::{IsolationError, Role};

/// The newest Landlock that is asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V4;

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

/// What may be done at a path and below.
#[derive(Debug, Clone, Copy, Default)]
struct Rights {
    /// Sockets and other names may be removed.
    remove: bool,
    /// Files may be opened, made, renamed and removed.
    change: bool,
}

/// The files and folders that the process may go on to use after it has started.
#[derive(Debug, Clone, Default)]
pub struct AllowedPaths(BTreeMap<PathBuf, Rights>);

impl AllowedPaths {
    /// A file or folder whose files may be opened, made, renamed and removed.
    pub fn allow(&mut self, path: &Path) -> &mut Self {
        self.0.entry(path.into()).or_default().change = true;
        self
    }

    /// The folder that a file or socket is in, where it may be made and removed.
    pub fn allow_folder_of(&mut self, path: &Path) -> &mut Self {
        self.allow(folder(path))
    }

    /// The folder that a socket is in, from which it may be removed.
    pub fn allow_removal(&mut self, path: &Path) -> &mut Self {
        self.0.entry(folder(path).into()).or_default().remove = true;
        self
    }
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Leaves the calling thread these paths alone. False if the kernel has no Landlock.
pub(super) fn restrict(role: Role, paths: &AllowedPaths) -> Result<bool, IsolationError> {
    try_restrict(role, paths).map_err(|error| IsolationError::Files {
        thread: role.name(),
        message: error.to_string(),
    })
}

fn try_restrict(role: Role, paths: &AllowedPaths) -> Result<bool, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .create()?;
    if role.opens_files() {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let rules = landlock::path_beneath_rules(NETWORK_FILES, read);
        ruleset = ruleset.add_rules(rules)?;
    }
    for (path, rights) in &paths.0 {
        let mut access = BitFlags::<AccessFs>::empty();
        if rights.remove {
            access |= AccessFs::RemoveFile;
        }
        if rights.change {
            access |= AccessFs::from_all(LANDLOCK) & !AccessFs::Execute;
        }
        // What isn't there is nobody's; whoever needs it says so.
        ruleset = ruleset.add_rules(landlock::path_beneath_rules([path], access))?;
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::thread;

    use super::*;

    #[test]
    fn threads_reach_what_they_were_left_and_what_was_open() {
        let folder = tempfile::TempDir::new().unwrap();
        let [allowed, forbidden] = ["allowed", "forbidden"].map(|name| folder.path().join(name));
        for folder in [&allowed, &forbidden] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("disk.img"), [0; 512]).unwrap();
        }
        let refused = |role: Role, paths: &AllowedPaths, path: &Path| {
            let (paths, path) = (paths.clone(), path.to_owned());
            // The restriction ends with the thread.
            let thread = thread::spawn(move || {
                let open = File::options().write(true).open(&path).unwrap();
                let restricted = restrict(role, &paths).unwrap();
                assert!(
                    restricted,
                    "this kernel has no Landlock (lsm=), so nothing can be tested"
                );
                open.set_len(1024).unwrap();
                let again = File::options().read(true).write(true).open(&path);
                let made = File::create(path.with_extension("new"));
                let kinds = [again.err(), made.err(), fs::remove_file(&path).err()];
                kinds.map(|error| error.map(|error| error.kind()))
            });
            thread.join().unwrap()
        };
        let mut paths = AllowedPaths::default();
        paths.allow(&allowed);
        let file = forbidden.join("disk.img");
        let denied = [Some(ErrorKind::PermissionDenied); 3];
        for role in [Role::Control, Role::Worker] {
            assert_eq!(refused(role, &paths, &file), denied, "{role:?}");
        }
        let of_worker = refused(
            Role::Worker,
            &AllowedPaths::default(),
            &allowed.join("disk.img"),
        );
        assert_eq!(of_worker, denied);
        assert_eq!(
            refused(Role::Control, &paths, &allowed.join("disk.img")),
            [None; 3]
        );
    }
}

//! Which files may be opened and changed, by Landlock.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};

use crate::RestrictError;

/// The newest Landlock that is asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V4;

/// The files and folders that a thread may go on to use. Nothing may be executed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedPaths(BTreeMap<PathBuf, BitFlags<AccessFs>>);

impl AllowedPaths {
    /// A file or folder that may be read.
    pub fn allow_read(&mut self, path: &Path) -> &mut Self {
        self.add(path, AccessFs::ReadFile | AccessFs::ReadDir)
    }

    /// A file or folder whose files may be opened, made, renamed and removed.
    pub fn allow(&mut self, path: &Path) -> &mut Self {
        self.add(path, AccessFs::from_all(LANDLOCK) & !AccessFs::Execute)
    }

    /// The folder that a file or socket is in, where it may be made and removed.
    pub fn allow_folder_of(&mut self, path: &Path) -> &mut Self {
        self.allow(folder(path))
    }

    /// The folder that a socket is in, from which it may be removed.
    pub fn allow_removal(&mut self, path: &Path) -> &mut Self {
        self.add(folder(path), AccessFs::RemoveFile.into())
    }

    /// Leaves the calling thread these paths alone, and those that it has from before. What isn't
    /// there is nobody's. False if the kernel has no Landlock.
    ///
    /// # Errors
    /// [`RestrictError::Files`].
    pub fn enforce(&self) -> Result<bool, RestrictError> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .create()?;
        for (path, access) in &self.0 {
            ruleset = ruleset.add_rules(path_beneath_rules([path], *access))?;
        }
        let status = ruleset.restrict_self()?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }

    fn add(&mut self, path: &Path, access: BitFlags<AccessFs>) -> &mut Self {
        *self.0.entry(path.into()).or_default() |= access;
        self
    }
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::thread;

    use super::*;

    /// What opening for writing, reading, making another file beside it and removing it come to,
    /// for a thread that has these paths.
    fn attempts(paths: &AllowedPaths, path: &Path) -> [Option<ErrorKind>; 4] {
        let (paths, path) = (paths.clone(), path.to_owned());
        // The restriction ends with the thread.
        let thread = thread::spawn(move || {
            let open = File::options().write(true).open(&path).unwrap();
            let restricted = paths.enforce().unwrap();
            assert!(
                restricted,
                "this kernel has no Landlock (lsm=), so nothing can be tested"
            );
            open.set_len(1024).unwrap();
            let written = File::options().write(true).open(&path).err();
            let read = File::open(&path).err();
            let made = File::create(path.with_extension("new")).err();
            [written, read, made, fs::remove_file(&path).err()]
                .map(|error| error.map(|error| error.kind()))
        });
        thread.join().unwrap()
    }

    #[test]
    fn threads_reach_what_they_were_left_and_what_was_open() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = |folder: &Path| {
            fs::create_dir_all(folder).unwrap();
            let file = folder.join("disk.img");
            fs::write(&file, [0; 512]).unwrap();
            file
        };
        let [changed, read, removed, other] =
            ["changed", "read", "removed", "other"].map(|name| folder.path().join(name));
        let mut paths = AllowedPaths::default();
        paths.allow(&changed).allow_read(&read);
        paths.allow_removal(&removed.join("socket"));
        let denied = Some(ErrorKind::PermissionDenied);
        assert_eq!(attempts(&paths, &file(&changed)), [None; 4]);
        assert_eq!(
            attempts(&paths, &file(&read)),
            [denied, None, denied, denied]
        );
        assert_eq!(
            attempts(&paths, &file(&removed)),
            [denied, denied, denied, None]
        );
        assert_eq!(attempts(&paths, &file(&other)), [denied; 4]);
        assert_eq!(
            attempts(&AllowedPaths::default(), &file(&changed)),
            [denied; 4]
        );
    }
}

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

use crate::sandbox::{note_mount, run};

/// A member's own small disk: ext4 on a loop device.
pub struct Disk {
    mount: PathBuf,
    frozen: bool,
}

impl Disk {
    /// Makes one of so many MiB; they take room as they are used.
    pub fn new(folder: &Path, name: &str, mib: u64) -> anyhow::Result<Self> {
        let image = folder.join(format!("{name}.img"));
        let mount = folder.join(name);
        File::create(&image)?.set_len(mib << 20)?;
        std::fs::create_dir(&mount)?;
        let (image, path) = (image.display().to_string(), mount.display().to_string());
        run("mkfs.ext4", &["-q", "-m", "0", "-E", "nodiscard", &image])?;
        note_mount(folder, &mount)?;
        run("mount", &["-o", "loop", &image, &path])?;
        Ok(Self {
            mount,
            frozen: false,
        })
    }

    /// Where the member's data is.
    pub fn data(&self) -> PathBuf {
        self.mount.join("data")
    }

    /// Takes all room that there is.
    pub fn fill(&self) -> anyhow::Result<()> {
        let ballast = File::options()
            .create(true)
            .append(true)
            .open(self.mount.join("ballast"))
            .context("open the file that fills the disk")?;
        let mut offset = ballast.metadata()?.len();
        let room = fstatvfs(&ballast)?;
        let mut piece = room.f_bavail * room.f_frsize;
        // What is left in the end is less than a block.
        while piece >= 4096 {
            match fallocate(&ballast, FallocateFlags::empty(), offset, piece) {
                Ok(()) => offset += piece,
                Err(rustix::io::Errno::NOSPC) => piece /= 2,
                Err(error) => return Err(error).context("fill the disk"),
            }
        }
        Ok(())
    }

    /// Gives the room back.
    pub fn make_room(&self) -> anyhow::Result<()> {
        match std::fs::remove_file(self.mount.join("ballast")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("remove the file that fills the disk")
            }
            _ => Ok(()),
        }
    }

    /// Lets every write and sync wait, as a disk does that does not answer. Reads of what is cached
    /// go on.
    pub fn freeze(&mut self) -> anyhow::Result<()> {
        /// A file system that was thawed just now may be busy for a moment.
        const TRIES: u32 = 50;
        let mount = self.mount.display().to_string();
        let mut tries = 1;
        while let Err(error) = run("fsfreeze", &["--freeze", &mount]) {
            if tries == TRIES {
                return Err(error);
            }
            tries += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
        self.frozen = true;
        Ok(())
    }

    /// Lets them go on.
    pub fn thaw(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.frozen) {
            run(
                "fsfreeze",
                &["--unfreeze", &self.mount.display().to_string()],
            )?;
        }
        Ok(())
    }

    /// Removes the member's data.
    pub fn wipe(&self) -> anyhow::Result<()> {
        match std::fs::remove_dir_all(self.data()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("remove a member's data")
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What fails here is tried once more from outside, at the end.
        let _ = self.thaw();
        let mount = self.mount.display().to_string();
        // What is written back afterwards would be in the way of the next run.
        if run("umount", &[&mount]).is_err() {
            let _ = run("umount", &["--lazy", &mount]);
        }
    }
}

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::LabError;
use crate::error::file;

/// An initramfs in the making: a `newc` cpio archive, as the kernel unpacks it
/// (Documentation/driver-api/early-userspace/buffer-format.rst). Not compressed: unpacking costs
/// more under emulation than reading.
#[derive(Default)]
pub(crate) struct Initramfs {
    archive: Vec<u8>,
    folders: BTreeSet<String>,
    inode: u32,
}

impl Initramfs {
    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        let mut partial = String::new();
        for part in parts(path) {
            if !partial.is_empty() {
                partial.push('/');
            }
            partial.push_str(part);
            if self.folders.insert(partial.clone()) {
                self.entry(&partial, ModeFileType::Directory, 0o755, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file with its parent folders.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, ModeFileType::Regular, mode, content)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, ModeFileType::Symlink, 0o777, target.as_bytes())
    }

    /// Adds a file of this machine.
    pub(crate) fn copy(&mut self, from: &Path, to: &str, mode: u32) -> Result<(), LabError> {
        let content = std::fs::read(from).map_err(file("read", from))?;
        self.file(to, mode, &content)
            .map_err(file("put in an initramfs", from))
    }

    /// The finished archive.
    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        trailer(self.archive)
    }

    fn parent(&mut self, path: &str) -> io::Result<()> {
        path.rsplit_once('/')
            .map_or(Ok(()), |(parent, _name)| self.folder(parent))
    }

    fn entry(
        &mut self,
        path: &str,
        kind: ModeFileType,
        mode: u32,
        content: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_error| io::Error::other("a file in a cpio archive is at most 4 GiB"))?;
        let path = parts(path).collect::<Vec<_>>().join("/");
        self.inode += 1;
        // The trailer is written by `finish`, so each entry only appends.
        let builder = Builder::new(&path)
            .ino(self.inode)
            .mode(mode)
            .nlink(1)
            .set_mode_file_type(kind);
        let mut writer = builder.write(std::mem::take(&mut self.archive), size);
        writer.write_all(content)?;
        self.archive = writer.finish()?;
        Ok(())
    }
}

/// The normal components of a path, without leading, doubled or dot components.
fn parts(path: &str) -> impl Iterator<Item = &str> {
    Path::new(path).components().filter_map(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// busybox's cpio is an independent reader of the format.
    #[test]
    fn busybox_unpacks_what_was_packed() {
        let mut initramfs = Initramfs::default();
        initramfs.folder("/proc").unwrap();
        initramfs.file("/etc/deep/odd", 0o640, b"abc").unwrap();
        initramfs.file("init", 0o755, &[7; 4097]).unwrap();
        initramfs.symlink("bin/sh", "busybox").unwrap();
        let archive = initramfs.finish().unwrap();

        let folder = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-i", "-d"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("busybox-static is installed by setup/debian-packages");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());

        assert!(folder.path().join("proc").is_dir());
        assert_eq!(
            std::fs::read(folder.path().join("etc/deep/odd")).unwrap(),
            b"abc"
        );
        assert_eq!(
            std::fs::read(folder.path().join("init")).unwrap(),
            [7; 4097]
        );
        let link = std::fs::read_link(folder.path().join("bin/sh")).unwrap();
        assert_eq!(link, Path::new("busybox"));
    }
}

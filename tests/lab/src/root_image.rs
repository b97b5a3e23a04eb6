//! The lab's disks: a writable root file system of its own, and one with the kernel's modules that
//! is made once per kernel.

use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{file, tail};
use crate::kernel::cache_subfolder;
use crate::tool::{Tool, libraries_of, locate};
use crate::{FileCopy, KernelFiles, LabError, LabOptions};

/// A folder tree that becomes an ext4 image. Files are hard links where they can be, so that
/// nothing large is copied twice.
struct RootTree {
    root: PathBuf,
}

/// Makes the root image for a lab at `image`. `init` is the lab's init on this machine.
pub(crate) fn make_root_image(
    image: &Path,
    options: &LabOptions,
    kernel: &KernelFiles,
    init: &Path,
) -> Result<(), LabError> {
    let parent = image.parent().unwrap_or(Path::new("."));
    let staging = tempfile::Builder::new()
        .prefix(".root-")
        .tempdir_in(parent)
        .map_err(file("make a folder in", parent))?;
    let tree = RootTree {
        root: staging.path().to_path_buf(),
    };
    tree.skeleton(kernel)?;
    tree.program(
        &Tool::find(&init.to_string_lossy())?,
        Path::new("/sbin/keelson-lab-init"),
    )?;
    for name in LabOptions::DEFAULT_TOOLS
        .iter()
        .copied()
        .chain(options.tools.iter().map(String::as_str))
    {
        let tool = Tool::find(name)?;
        let to = Path::new("/usr/sbin").join(&tool.name);
        tree.program(&tool, &to)?;
    }
    for copy in &options.files {
        tree.caller_file(copy)?;
    }
    // Not busybox's shell: Debian's prefers its own applets to the real tools.
    let shell = tree.root.join("usr/bin/sh");
    symlink("/usr/sbin/dash", &shell).map_err(file("make", &shell))?;
    tree.busybox()?;
    make_ext4(&tree.root, image, options.disk_mib)
}

/// The image with a kernel's modules, made once; it is never written to.
pub(crate) fn modules_image(kernel: &KernelFiles) -> Result<PathBuf, LabError> {
    let folder = cache_subfolder("lab")?;
    let image = folder.join(format!("modules-{}.img", kernel.release));
    if image.is_file() {
        return Ok(image);
    }
    // Several labs may start at once: each makes its own, and one rename wins.
    let scratch = tempfile::Builder::new()
        .prefix(".modules-")
        .tempfile_in(&folder)
        .map_err(file("make a file in", &folder))?;
    make_ext4(&kernel.modules, scratch.path(), 256)?;
    scratch.persist(&image).map_err(|error| LabError::File {
        doing: "rename to",
        path: image.clone(),
        source: error.error,
    })?;
    Ok(image)
}

impl RootTree {
    fn skeleton(&self, kernel: &KernelFiles) -> Result<(), LabError> {
        for folder in [
            "dev", "proc", "sys", "run", "tmp", "root", "mnt", "lab/bin", "etc", "usr/sbin",
            "usr/bin", "usr/lib", "var/lib", "var/log",
        ] {
            self.folder(Path::new(folder))?;
        }
        self.folder(&Path::new("usr/lib/modules").join(&kernel.release))?;
        // As on Debian: one /usr, so that a library is found whichever way it is named.
        self.folder(Path::new("usr/lib64"))?;
        for name in ["bin", "sbin", "lib", "lib64"] {
            let link = self.root.join(name);
            symlink(format!("usr/{name}"), &link).map_err(file("make", &link))?;
        }
        self.text(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )?;
        self.text(
            "etc/group",
            "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n",
        )?;
        self.text(
            "etc/hosts",
            "127.0.0.1 localhost keelson-lab\n::1 localhost\n",
        )?;
        self.text("etc/hostname", "keelson-lab\n")?;
        self.text("etc/mke2fs.conf", "[defaults]\n\tbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr\n\tblocksize = 4096\n\tinode_size = 256\n\tinode_ratio = 16384\n[fs_types]\n\text4 = {\n\t\tfeatures = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize\n\t}\n")
    }

    fn program(&self, tool: &Tool, to: &Path) -> Result<(), LabError> {
        self.place(&tool.program, to)?;
        self.libraries(&tool.libraries)
    }

    fn libraries<'a>(
        &self,
        libraries: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Result<(), LabError> {
        libraries
            .into_iter()
            .try_for_each(|library| self.place(library, library))
    }

    /// A file or folder that the caller wants. Programs among them bring their libraries.
    fn caller_file(&self, copy: &FileCopy) -> Result<(), LabError> {
        let metadata = std::fs::metadata(&copy.from).map_err(file("read", &copy.from))?;
        if metadata.is_dir() {
            let entries = std::fs::read_dir(&copy.from).map_err(file("list", &copy.from))?;
            self.folder(&copy.to)?;
            for entry in entries {
                let entry = entry.map_err(file("list", &copy.from))?;
                self.caller_file(&FileCopy {
                    from: entry.path(),
                    to: copy.to.join(entry.file_name()),
                })?;
            }
            return Ok(());
        }
        if metadata.permissions().mode() & 0o111 != 0 && is_elf(&copy.from) {
            self.libraries(&libraries_of(&copy.from)?)?;
        }
        self.place(&copy.from, &copy.to)
    }

    /// busybox under the names of all its applets that no real tool has taken.
    fn busybox(&self) -> Result<(), LabError> {
        let busybox = Tool::find("busybox")?;
        self.program(&busybox, Path::new("/usr/bin/busybox"))?;
        let output = Command::new(&busybox.program)
            .arg("--list")
            .stdin(Stdio::null())
            .output();
        let output = output.map_err(file("run", &busybox.program))?;
        for applet in String::from_utf8_lossy(&output.stdout).lines() {
            let taken = ["usr/bin", "usr/sbin", "usr/local/bin", "lab/bin"]
                .iter()
                .any(|folder| {
                    self.root
                        .join(folder)
                        .join(applet)
                        .symlink_metadata()
                        .is_ok()
                });
            let link = self.root.join("usr/bin").join(applet);
            if !taken {
                symlink("busybox", &link).map_err(file("make", &link))?;
            }
        }
        Ok(())
    }

    /// The path below the tree for a path in the lab. Such paths have no `..`.
    fn inside(&self, path: &Path) -> Result<PathBuf, LabError> {
        if path
            .components()
            .any(|part| part == std::path::Component::ParentDir)
        {
            return Err(LabError::BadOption(format!(
                "{} has a .. in it",
                path.display()
            )));
        }
        Ok(self.root.join(path.strip_prefix("/").unwrap_or(path)))
    }

    fn folder(&self, path: &Path) -> Result<(), LabError> {
        let path = self.inside(path)?;
        std::fs::create_dir_all(&path).map_err(file("make", &path))
    }

    fn text(&self, path: &str, content: &str) -> Result<(), LabError> {
        let path = self.root.join(path);
        std::fs::write(&path, content).map_err(file("write", &path))
    }

    fn place(&self, from: &Path, to: &Path) -> Result<(), LabError> {
        if let Some(parent) = to.parent() {
            self.folder(parent)?;
        }
        let to = self.inside(to)?;
        // A link to the symbolic link itself would dangle in the lab.
        let from = std::fs::canonicalize(from).map_err(file("find", from))?;
        let _absent = std::fs::remove_file(&to);
        if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to).map_err(file("copy", &from))?;
        }
        Ok(())
    }
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic))
        .is_ok_and(|()| magic == *b"\x7fELF")
}

/// An ext4 image of `size_mib` MiB, sparse, with the content of a folder.
fn make_ext4(folder: &Path, image: &Path, size_mib: u64) -> Result<(), LabError> {
    let program = locate("mke2fs").ok_or_else(|| LabError::ProgramMissing {
        program: "mke2fs".to_owned(),
        reason: "not found".to_owned(),
        remedy: "setup/debian-packages installs e2fsprogs",
    })?;
    let size = format!("{size_mib}M");
    let arguments = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-L",
        "keelson-lab",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
        "-d",
    ];
    let output = Command::new(&program)
        .args(arguments)
        .args([folder.as_os_str(), image.as_os_str(), OsStr::new(&size)])
        .stdin(Stdio::null())
        .output()
        .map_err(file("run", &program))?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::ProgramFailed {
        program: "mke2fs",
        stderr: tail(&String::from_utf8_lossy(&output.stderr), 5),
    })
}

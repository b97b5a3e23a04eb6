//! Programs of this machine, with the shared libraries they need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::LabError;

/// A program and the files without which it does not start.
#[derive(Debug)]
pub(crate) struct Tool {
    /// The program on this machine.
    pub(crate) program: PathBuf,
    /// Its name, without folders.
    pub(crate) name: String,
    /// Shared libraries and the dynamic loader, at the paths where it looks for them.
    pub(crate) libraries: BTreeSet<PathBuf>,
}

impl Tool {
    /// Finds a program by path, or by name in `PATH` and the system folders.
    pub(crate) fn find(name_or_path: &str) -> Result<Self, LabError> {
        let missing = |reason: &str| LabError::ProgramMissing {
            program: name_or_path.to_owned(),
            reason: reason.to_owned(),
            remedy: "setup/debian-packages installs what the lab needs",
        };
        let program = locate(name_or_path).ok_or_else(|| missing("not found"))?;
        let name = program
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| missing("its name is not UTF-8"))?
            .to_owned();
        Ok(Self {
            libraries: libraries_of(&program)?,
            name,
            program,
        })
    }
}

pub(crate) fn locate(name_or_path: &str) -> Option<PathBuf> {
    let is_file = |path: &PathBuf| path.is_file();
    if name_or_path.contains('/') {
        return Some(PathBuf::from(name_or_path)).filter(is_file);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name_or_path))
        .find(is_file)
}

/// What the dynamic loader would map for a program: empty for a static one. ldd(1) runs the
/// loader, so this is for programs that this machine trusts anyway.
pub(crate) fn libraries_of(program: &Path) -> Result<BTreeSet<PathBuf>, LabError> {
    let output = Command::new("ldd")
        .arg(program)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| LabError::ProgramMissing {
            program: "ldd".to_owned(),
            reason: error.to_string(),
            remedy: "install libc-bin",
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        return Err(LabError::ProgramMissing {
            program: program.display().to_string(),
            reason: format!("a library is missing: {}", line.trim()),
            remedy: "install the package that has it",
        });
    }
    Ok(text.lines().filter_map(library_of_line).collect())
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library_of_line(line: &str) -> Option<PathBuf> {
    let line = line.trim();
    let path = line.split_once("=> ").map_or(line, |(_name, path)| path);
    let path = path.split(" (").next()?.trim();
    path.starts_with('/').then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_give_library_paths() {
        let path = |line| library_of_line(line).map(|path| path.display().to_string());
        assert_eq!(
            path("\tlibc.so.6 => /lib/libc.so.6 (0x7f)").as_deref(),
            Some("/lib/libc.so.6")
        );
        assert_eq!(
            path("\t/lib64/ld.so.2 (0x7f)").as_deref(),
            Some("/lib64/ld.so.2")
        );
        assert_eq!(path("\tlinux-vdso.so.1 (0x7ffd)"), None);
        assert_eq!(path("\tstatically linked"), None);
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Tool::find("keelson-no-such-tool").unwrap_err().to_string();
        assert!(error.contains("keelson-no-such-tool"), "{error}");
    }
}

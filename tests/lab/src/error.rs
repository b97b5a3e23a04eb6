use std::path::PathBuf;

/// Why a lab, a command in it, or one of its images could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file or folder of this machine could not be read or written.
    #[error("cannot {doing} {path}: {source}", path = path.display())]
    File {
        /// What was tried, as a verb phrase.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A kernel is not in the cache.
    #[error("kernel {series} is not in {folder}: run setup/kernels", folder = folder.display())]
    KernelMissing {
        /// The series asked for, such as `6.12`.
        series: String,
        /// Where it was expected.
        folder: PathBuf,
    },
    /// A kernel has no module of the given name, neither built in nor as a file.
    #[error("kernel {release} has no module {module}, neither built in nor as a file")]
    ModuleMissing {
        /// The kernel's release name.
        release: String,
        /// The module's name.
        module: String,
    },
    /// A program that the lab is made with or of is not installed.
    #[error("{program} is not installed or cannot be run ({reason}): {remedy}")]
    ProgramMissing {
        /// Its name or path.
        program: String,
        /// What was seen.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A program that makes an image failed.
    #[error("{program} failed: {stderr}")]
    ProgramFailed {
        /// Its name.
        program: &'static str,
        /// The last lines it printed.
        stderr: String,
    },
    /// An option contradicts itself or a limit.
    #[error("{0}")]
    BadOption(String),
    /// The lab's QEMU ended before the lab was ready.
    #[error("the lab ended while starting ({status}); the end of {log}: {tail}", log = log.display())]
    DiedEarly {
        /// QEMU's exit status, in words.
        status: String,
        /// The file with QEMU's and the kernel's output.
        log: PathBuf,
        /// That file's last lines.
        tail: String,
    },
    /// The lab did not answer in time.
    #[error("the lab did not {doing} within {seconds} s; see {log}", log = log.display())]
    TimedOut {
        /// What it should have done.
        doing: &'static str,
        /// The limit.
        seconds: u64,
        /// The file with QEMU's and the kernel's output.
        log: PathBuf,
    },
    /// No lab runs with this state folder.
    #[error("no lab is up in {folder}: start one with keelson-lab up", folder = folder.display())]
    NotUp {
        /// The state folder.
        folder: PathBuf,
    },
    /// A lab already runs with this state folder.
    #[error("a lab is already up in {folder} (process {process_id}): keelson-lab down ends it", folder = folder.display())]
    AlreadyUp {
        /// The state folder.
        folder: PathBuf,
        /// The QEMU process.
        process_id: u32,
    },
    /// The connection to the lab broke, or what came over it makes no sense.
    #[error("the connection to the lab failed while {doing}: {source}")]
    Connection {
        /// What was going on.
        doing: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The lab understood a request and could not do it.
    #[error("in the lab: {0}")]
    Refused(String),
    /// A command in the lab ran for longer than it may; it was killed.
    #[error(
        "{command} was killed in the lab after its time limit of {seconds} s; it had printed:\n{output}"
    )]
    CommandTimedOut {
        /// The command.
        command: String,
        /// Its limit.
        seconds: u64,
        /// The last lines that it printed.
        output: String,
    },
}

impl LabError {
    /// Whether the lab's kernel panicked before the lab was ready, over nothing that ran in it.
    pub(crate) fn is_kernel_panic(&self) -> bool {
        match self {
            Self::DiedEarly { tail, .. } => {
                tail.contains("Kernel panic") && !tail.contains("Attempted to kill init")
            }
            _ => false,
        }
    }
}

/// `.map_err(file("read", &path))`: an I/O error with what was tried on which path.
pub(crate) fn file<'a>(
    doing: &'static str,
    path: &'a std::path::Path,
) -> impl FnOnce(std::io::Error) -> LabError + 'a {
    move |source| LabError::File {
        doing,
        path: path.to_path_buf(),
        source,
    }
}

/// The last `lines` lines of a log, for a message.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

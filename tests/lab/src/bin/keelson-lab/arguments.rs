use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use keelson_lab::{FileCopy, cache_folder};

/// A Debian kernel as a KVM host under emulation.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// Folder with the lab's disk, log and state [default: lab/default in the cache].
    #[arg(long, global = true)]
    state: Option<PathBuf>,
}

impl Arguments {
    pub fn state_folder(&self) -> PathBuf {
        self.state
            .clone()
            .unwrap_or_else(|| cache_folder().join("lab/default"))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a lab; returns when /dev/kvm is there. The lab goes on in the background.
    Up(UpArguments),
    /// Run a command in the lab; its exit code is this program's. Failures of the lab give 255.
    Exec(ExecArguments),
    /// Copy a file into the lab.
    Put {
        /// On this machine.
        from: PathBuf,
        /// In the lab, absolute.
        to: PathBuf,
    },
    /// Copy a file out of the lab.
    Get {
        /// In the lab, absolute.
        from: PathBuf,
        /// On this machine.
        to: PathBuf,
    },
    /// End the lab.
    Down,
    /// Say how the lab is, as JSON if standard output is not a terminal.
    Status,
    /// Write an initramfs with which a stock kernel boots as a test guest.
    GuestInitrd {
        /// Series of the guest's kernel.
        #[arg(long, default_value = "6.12")]
        kernel: String,
        /// Where to.
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct UpArguments {
    /// Series of the lab's kernel: 6.12 (has TCX) or 6.1.
    #[arg(long, default_value = "6.12")]
    pub kernel: String,
    /// Memory in MiB.
    #[arg(long, default_value_t = 2048)]
    pub memory: u32,
    /// Emulated processors.
    #[arg(long, default_value_t = 1)]
    pub cpus: u8,
    /// Size of the root disk in MiB; the file is sparse.
    #[arg(long, default_value_t = 8192)]
    pub disk: u64,
    /// A file or folder to have in the lab; programs bring their libraries. Can be repeated.
    #[arg(long = "file", value_name = "SRC:DST")]
    pub files: Vec<FileCopy>,
    /// A program of this machine to have in the lab, at /usr/sbin. Can be repeated.
    #[arg(long = "tool", value_name = "PROGRAM")]
    pub tools: Vec<String>,
    /// One more kernel module to load. Can be repeated.
    #[arg(long = "module", value_name = "NAME")]
    pub modules: Vec<String>,
    /// Minutes after which the lab powers itself off.
    #[arg(long, default_value_t = 120)]
    pub lifetime: u64,
}

#[derive(Debug, Args)]
pub struct ExecArguments {
    /// Give the command a terminal; standard input must be one.
    #[arg(long)]
    pub tty: bool,
    /// An environment variable. Can be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = environment)]
    pub environment: Vec<(String, String)>,
    /// Working directory.
    #[arg(long)]
    pub directory: Option<PathBuf>,
    /// Seconds after which the command is killed (exit code 124).
    #[arg(long)]
    pub timeout: Option<u64>,
    /// The command.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

fn environment(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| format!("{text:?} is not NAME=VALUE"))
}

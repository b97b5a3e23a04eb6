use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What runs as a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// keelson-state, which stands beside this program.
    KeelsonState,
    /// The etcd that `setup/etcd` fetches.
    Etcd,
}

impl Program {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeelsonState => "keelson-state",
            Self::Etcd => "etcd",
        }
    }

    /// Where it is.
    pub fn path(self) -> anyhow::Result<PathBuf> {
        let (path, how) = match self {
            Self::KeelsonState => {
                let here = std::env::current_exe()?;
                let folder = here.parent().context("this program is in no folder")?;
                (
                    folder.join("keelson-state"),
                    "`cargo build -p keelson-state` builds it",
                )
            }
            Self::Etcd => (etcd_folder()?.join("etcd"), "`setup/etcd` fetches it"),
        };
        if !path.exists() {
            bail!("there is no {}: {how}", path.display());
        }
        Ok(path)
    }

    /// Its command with what is alike for both, and what etcd's documentation recommends for a
    /// cluster whose data matters: it looks for corruption at the start, and all the time.
    pub fn command(self, data: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(self.path()?);
        command.arg("--data-dir").arg(data);
        command.args(["--heartbeat-interval=100", "--election-timeout=1000"]);
        command.args(match self {
            Self::KeelsonState => &["--watch-progress-notify-interval=1s"][..],
            Self::Etcd => &[
                "--experimental-watch-progress-notify-interval=1s",
                "--experimental-initial-corrupt-check=true",
                "--experimental-corrupt-check-time=5s",
                "--experimental-compact-hash-check-enabled=true",
                "--experimental-compact-hash-check-time=5s",
                "--logger=zap",
                "--log-level=warn",
            ],
        });
        Ok(command)
    }
}

fn etcd_folder() -> anyhow::Result<PathBuf> {
    let cache = match std::env::var_os("KEELSON_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?)
            .join(".cache/keelson"),
    };
    Ok(cache.join("etcd"))
}

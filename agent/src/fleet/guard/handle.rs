//! The agent's side of the guard: starts it, and tells it deadlines.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::config::Config;
use crate::fleet::Instant;
use crate::guest::GuestPaths;
use crate::host::{LaunchRequest, ProcessHandle};
use crate::{AgentError, error::Result};

/// How long the guard may take to start.
const READY_LIMIT: Duration = Duration::from_secs(5);
const READY_POLL: Duration = Duration::from_millis(5);
/// How long it may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Where the guard of a run directory listens.
pub(super) fn socket_path(run_directory: &Path) -> PathBuf {
    run_directory.join("guard.sock")
}

/// The agent's side of the guard.
#[derive(Debug)]
pub struct Guard {
    config: Config,
    process: Mutex<Option<ProcessHandle>>,
}

impl Guard {
    /// The guard of an agent's run directory, which need not run.
    pub fn new(config: &Config) -> Self {
        Self {
            config: config.clone(),
            process: Mutex::new(None),
        }
    }

    /// Finds the guard that an earlier agent started. Where guests run on a lease and there is no guard,
    /// nobody knows since when that is over: they are killed.
    ///
    /// # Errors
    /// [`AgentError::Io`] where the guard's record can't be read.
    pub async fn adopt(&self) -> Result<()> {
        let found = ProcessHandle::find(&self.record())?;
        if let Some(Ok(process)) = found {
            *self.process.lock().await = Some(process);
            return Ok(());
        }
        if super::fence(&self.config.run_directory) {
            tracing::error!(
                "guests that run on this host's lease had no guard; they were killed, since they may \
                 have been started elsewhere"
            );
        }
        Ok(())
    }

    /// Sees to it that the guard runs and knows `deadline`.
    ///
    /// # Errors
    /// [`AgentError::Process`] or [`AgentError::Io`] where it can't be started or doesn't answer.
    pub async fn arm(&self, deadline: Instant) -> Result<()> {
        let mut process = self.process.lock().await;
        let runs = process
            .as_ref()
            .is_some_and(|process| process.has_ended().is_none());
        if !runs {
            if let Some(ended) = process.take() {
                ended.reap();
            }
            *process = Some(self.launch(deadline)?);
        }
        self.tell(deadline, !runs).await
    }

    /// Tells a guard that runs a new deadline. Where it is gone, and guests need it, there is another
    /// one then.
    ///
    /// # Errors
    /// As [`Self::arm`].
    pub async fn renew(&self, deadline: Instant) -> Result<()> {
        let runs = {
            let process = self.process.lock().await;
            process
                .as_ref()
                .is_some_and(|process| process.has_ended().is_none())
        };
        if runs || self.is_needed() {
            return self.arm(deadline).await;
        }
        Ok(())
    }

    /// Waits until the guard's process ends; for ever where there is none.
    pub async fn ended(&self) {
        let process = self.process.lock().await.clone();
        match process {
            Some(process) if process.has_ended().is_none() => {
                process.ended().await;
            }
            _ => std::future::pending().await,
        }
    }

    /// Whether any guest of this host runs on its lease.
    pub fn is_needed(&self) -> bool {
        let run_directory = &self.config.run_directory;
        let entries = std::fs::read_dir(GuestPaths::all_in(run_directory));
        entries.into_iter().flatten().flatten().any(|entry| {
            GuestPaths::in_run_directory(run_directory, &entry.file_name())
                .lease()
                .exists()
        })
    }

    fn record(&self) -> PathBuf {
        self.config.run_directory.join("guard.process")
    }

    fn launch(&self, deadline: Instant) -> Result<ProcessHandle> {
        let nanoseconds = deadline.time_since_boot().as_nanos();
        ProcessHandle::launch(&LaunchRequest {
            program: self.config.programs()?.join("keelsond"),
            arguments: vec![
                "--guard".into(),
                self.config.run_directory.clone().into(),
                "--guard-deadline".into(),
                nanoseconds.to_string().into(),
            ],
            unit: "keelson-guard".into(),
            log: self.config.log_directory.join("guard.log"),
            record: self.record(),
            limits: keelson_api::ResourceLimits::default(),
            inherited: None,
            lease: None,
        })
    }

    async fn tell(&self, deadline: Instant, starting: bool) -> Result<()> {
        let limit = if starting { READY_LIMIT } else { ANSWER_LIMIT };
        let path = socket_path(&self.config.run_directory);
        let telling = async {
            loop {
                match tell(&path, deadline).await {
                    Err(_) if starting => tokio::time::sleep(READY_POLL).await,
                    told => return told,
                }
            }
        };
        let failed = |message: String| AgentError::Process {
            reason: "GuardUnreachable",
            message: format!("the guard that kills guests when the host's lease ends: {message}"),
        };
        match tokio::time::timeout(limit, telling).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("it doesn't answer within {limit:?}"))),
        }
    }
}

async fn tell(path: &Path, deadline: Instant) -> io::Result<()> {
    let mut stream = UnixStream::connect(path).await?;
    let line = format!("{}\n", deadline.time_since_boot().as_nanos());
    stream.write_all(line.as_bytes()).await?;
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).await?;
    if &answer == b"ok\n" {
        Ok(())
    } else {
        Err(io::Error::other("it doesn't understand"))
    }
}

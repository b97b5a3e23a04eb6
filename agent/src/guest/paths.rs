//! Where a guest's sockets, records and logs are.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::{AgentError, error::Result};

/// Where a guest's sockets, records and logs are.
#[derive(Clone, Debug)]
pub struct GuestPaths {
    run: PathBuf,
    log: PathBuf,
}

impl GuestPaths {
    /// The folder that holds one folder for each guest that was started.
    pub fn all_guests(config: &Config) -> PathBuf {
        Self::all_in(&config.run_directory)
    }

    /// The same, of a run directory.
    pub fn all_in(run_directory: &Path) -> PathBuf {
        run_directory.join("vms")
    }

    /// The paths of the guest `name`.
    pub fn new(config: &Config, name: &str) -> Self {
        Self {
            run: Self::all_guests(config).join(name),
            log: config.log_directory.join(name),
        }
    }

    /// The paths in the run directory of the guest `name`, for who does not know where its logs are.
    pub fn in_run_directory(run_directory: &Path, name: &OsStr) -> Self {
        let run = Self::all_in(run_directory).join(name);
        Self {
            log: run.clone(),
            run,
        }
    }

    /// The guest's folder in the run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Says that the guest is killed when the host's lease is about to end.
    pub fn lease(&self) -> PathBuf {
        self.run.join("lease")
    }

    /// Says that and when it was.
    pub fn fenced(&self) -> PathBuf {
        self.run.join("fenced")
    }

    /// Creates the guest's folders.
    pub fn create(&self) -> Result<()> {
        for directory in [&self.run, &self.log] {
            fs::create_dir_all(directory)
                .map_err(AgentError::io(format!("create {}", directory.display())))?;
        }
        Ok(())
    }

    /// Removes sockets and records; logs stay.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.run) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(AgentError::io(format!(
                "remove {}",
                self.run.display()
            ))(error)),
            _ => Ok(()),
        }
    }

    /// Removes the logs of a guest that is deleted.
    pub fn remove_logs(&self) -> Result<()> {
        match fs::remove_dir_all(&self.log) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(AgentError::io(format!(
                "remove {}",
                self.log.display()
            ))(error)),
            _ => Ok(()),
        }
    }

    /// Whether the guest was started and not torn down since.
    pub fn exist(&self) -> bool {
        self.run.is_dir()
    }

    /// The configuration of its keelson-vmm.
    pub fn vmm_config(&self) -> PathBuf {
        self.run.join("vmm.json")
    }

    /// The record of its keelson-vmm process.
    pub fn vmm_record(&self) -> PathBuf {
        self.run.join("vmm.process")
    }

    /// What the running guest was started from: its plan.
    pub fn plan(&self) -> PathBuf {
        self.run.join("plan")
    }

    /// How its keelson-vmm said that the guest ended.
    pub fn exit(&self) -> PathBuf {
        self.run.join("exit")
    }

    /// The API socket of its keelson-vmm.
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// The socket of its socket device.
    pub fn vsock_socket(&self) -> PathBuf {
        self.run.join("vsock.sock")
    }

    /// Its serial console.
    pub fn console_socket(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    /// The log of its serial console.
    pub fn console_log(&self) -> PathBuf {
        self.log.join("console.log")
    }

    /// The log of its keelson-vmm.
    pub fn vmm_log(&self) -> PathBuf {
        self.log.join("vmm.log")
    }

    /// The vhost-user socket of one of its disks.
    pub fn disk_socket(&self, disk: &str) -> PathBuf {
        self.run.join(format!("{disk}.disk"))
    }

    /// The control socket of the keelson-blk process of one of its disks.
    pub fn disk_control(&self, disk: &str) -> PathBuf {
        self.run.join(format!("{disk}.disk.control"))
    }

    /// The record of the keelson-blk process of one of its disks.
    pub fn disk_record(&self, disk: &str) -> PathBuf {
        self.run.join(format!("{disk}.disk.process"))
    }

    /// The log of the keelson-blk of one of its disks.
    pub fn disk_log(&self, disk: &str) -> PathBuf {
        self.log.join(format!("{disk}.disk.log"))
    }

    /// The disk by which cloud-init in the guest learns what to do.
    pub fn cloud_init_image(&self) -> PathBuf {
        self.run.join("cidata.img")
    }

    /// Removes the sockets and the record of the keelson-blk of a disk that the guest has no longer.
    pub fn remove_disk(&self, disk: &str) -> Result<()> {
        for path in [
            self.disk_socket(disk),
            self.disk_control(disk),
            self.disk_record(disk),
        ] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(AgentError::io(format!("remove {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The records of all keelson-blk processes that were started for it.
    pub fn disk_records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.run).into_iter().flatten().flatten();
        let is_record = |path: &Path| path.to_string_lossy().ends_with(".disk.process");
        entries
            .map(|entry| entry.path())
            .filter(|path| is_record(path))
            .collect()
    }
}

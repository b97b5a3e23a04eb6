//! The disks' backends of a guest that runs.

use std::time::Duration;

use keelson_api::DiskSpec;

use super::{Problem, Runtime};
use crate::error::Result;
use crate::guest::device::Device;
use crate::guest::disk_backend;
use crate::guest::jail::JailUser;
use crate::guest::plan::Plan;
use crate::host::write_atomically;

/// How long another file may be at a disk's path, while a snapshot is made, before it is served.
const SNAPSHOT_TIME: Duration = Duration::from_millis(300);

impl Runtime {
    /// Replaces the first backend that has ended, and looks for images that are gone; what was wrong.
    pub(super) async fn keep_backends(&mut self) -> Result<Option<Problem>> {
        let Some(running) = &self.running else {
            return Ok(None);
        };
        // One that the guest doesn't have yet is started when it gets it.
        let disks = running.hardware.disks.iter();
        let disks = disks.filter(|(disk, _)| !running.adding.contains(&Device::Disk(disk.clone())));
        for (disk, spec) in disks.cloned().collect::<Vec<_>>() {
            if self.has_vanished(&disk, &spec).await {
                let path = spec.path.display();
                return Ok(Some((
                    "DiskVanished",
                    format!("disk {disk}: {path} was removed or replaced while the guest uses it"),
                )));
            }
            let backend = self.disks.get(&disk);
            let ended = backend.is_none_or(|process| process.has_ended().is_some());
            if ended {
                return self.replace_backend(&disk, &spec).await.map(Some);
            }
        }
        Ok(None)
    }

    /// Whether a disk's image is no longer the one that is served.
    pub(super) async fn has_vanished(&self, disk: &str, spec: &DiskSpec) -> bool {
        for wait in [SNAPSHOT_TIME, Duration::ZERO] {
            let vanished = self.disks.get(disk).is_some_and(|process| {
                // The files of one that ended are closed, whatever became of its image.
                disk_backend::image_vanished(process, spec) && process.has_ended().is_none()
            });
            if !vanished {
                return false;
            }
            tokio::time::sleep(wait).await;
        }
        true
    }

    /// Takes over what can change of a disk while a guest runs: limits, and sizes that grow.
    pub(super) async fn adjust_disks(&mut self, plan: &Plan) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let mut changed = false;
        let leaving = running.removing.clone();
        for (name, before) in &mut running.hardware.disks {
            // The planned one may be another of the same name.
            if leaving.contains(&Device::Disk(name.clone())) {
                continue;
            }
            let planned = plan.hardware.disks.iter();
            let mut planned = planned.filter(|(disk, _)| disk == name);
            let Some((_, after)) = planned.next() else {
                continue;
            };
            let adjusted = DiskSpec {
                limits: after.limits,
                size: after.size,
                ..before.clone()
            };
            if adjusted == *before {
                continue;
            }
            disk_backend::adjust(&self.paths, name, before, &adjusted).await?;
            *before = adjusted;
            changed = true;
        }
        if changed {
            write_atomically(&self.paths.plan(), running)?;
        }
        Ok(())
    }

    async fn replace_backend(&mut self, disk: &str, spec: &DiskSpec) -> Result<Problem> {
        let reason = match self.disks.remove(disk) {
            Some(process) => {
                let exit = process.ended().await;
                process.reap();
                match exit.code {
                    Some(code) => format!("exit code {code}: {}", exit.last_line),
                    None => "by a signal, or unseen".into(),
                }
            }
            None => "unseen".into(),
        };
        let programs = self.agent.config.programs()?;
        // Nothing is created where an image was: the guest would go on with another disk.
        let lease = self.lease.clone();
        let process =
            disk_backend::start(&programs, &self.paths, &self.name, disk, spec, lease).await?;
        if self.agent.config.jail {
            JailUser::of(&self.name).own_socket(&self.paths, disk)?;
        }
        self.disks.insert(disk.into(), process);
        Ok((
            "DiskBackendEnded",
            format!(
                "disk {disk}: keelson-blk ended ({reason}) and was started again; the guest goes on \
                 with what was under way"
            ),
        ))
    }
}

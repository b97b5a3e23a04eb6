//! Segments' files: prepared ahead, taken into use, and kept for the next use.

use std::io;

use super::segment::{self, Segment};
use super::{Log, SPARE_SEGMENTS};
use crate::disk::Disk;
use crate::{Limits, MemberError};

/// Creates a prepared file for [`Log::add_spare`]; `None` if there is no room for it now. Slow: may
/// run beside the log.
pub fn prepare_spare(
    disk: &dyn Disk,
    number: u64,
    limits: &Limits,
) -> Result<Option<String>, MemberError> {
    let name = format!("spare-new-{number:016x}");
    match segment::prepare(disk, &name, limits.segment_bytes) {
        Ok(()) => Ok(Some(name)),
        Err(MemberError::Disk { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {
            // What there is of it is room that others need more.
            match disk.remove(&name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(MemberError::disk(format!("remove {name}"))(error))
                }
                _ => Ok(None),
            }
        }
        Err(error) => Err(error),
    }
}

impl Log {
    pub(super) fn start_segment(&mut self) -> Result<(), MemberError> {
        let sequence = self.segments.back().map_or(0, |last| last.sequence) + 1;
        let name = segment::name(sequence);
        let spare = if let Some(spare) = self.spares.pop() {
            spare
        } else {
            // Under its own name only once it is whole.
            let spare = spare_name(sequence);
            segment::prepare(&*self.disk, &spare, self.limits.segment_bytes)?;
            spare
        };
        self.disk
            .rename(&spare, &name)
            .map_err(MemberError::disk(format!("rename {spare} to {name}")))?;
        let file = self
            .disk
            .open_for_blocks(&name, false)
            .map_err(MemberError::disk(format!("open {name}")))?;
        self.disk
            .sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        self.segments.push_back(Segment::start(
            file,
            sequence,
            self.owner,
            self.next_number,
            self.limits.segment_bytes,
        )?);
        Ok(())
    }

    pub(super) fn retire(&mut self, sequence: u64) -> Result<(), MemberError> {
        let name = segment::name(sequence);
        if self.spares.len() < SPARE_SEGMENTS {
            let spare = spare_name(sequence);
            self.disk
                .rename(&name, &spare)
                .map_err(MemberError::disk(format!("rename {name} to {spare}")))?;
            // A number comes twice if a segment with nothing in it was retired: the file of before is
            // replaced.
            if !self.spares.contains(&spare) {
                self.spares.push(spare);
            }
            return Ok(());
        }
        self.disk
            .remove(&name)
            .map_err(MemberError::disk(format!("remove {name}")))
    }

    /// How many prepared files are missing.
    pub fn missing_spares(&self) -> usize {
        SPARE_SEGMENTS.saturating_sub(self.spares.len())
    }

    /// Takes a file that [`prepare_spare`] made.
    pub fn add_spare(&mut self, name: String) {
        self.spares.push(name);
    }
}

fn spare_name(sequence: u64) -> String {
    format!("spare-{sequence:016x}")
}

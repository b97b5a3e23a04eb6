//! Which alignment a file needs for O_DIRECT, if it can do it at all.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::aligned_buffer::AlignedBuffer;

/// What O_DIRECT asks of each transfer, in bytes, both powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of each buffer's address.
    pub memory: usize,
    /// Of the file offset and of each buffer's length.
    pub offset: usize,
}

/// No disk sector in use is larger, and nothing that asks for more is worth O_DIRECT.
const LARGEST_ALIGNMENT: usize = 64 * 1024;

/// Finds the alignment of a file that was opened with O_DIRECT.
///
/// Asks `statx(STATX_DIOALIGN)` (Linux 6.1 and later, file systems that answer), and where
/// that says nothing, reads the first sectors with growing alignments.
pub fn probe(file: &File) -> Result<DirectAlignment, String> {
    match ask_statx(file) {
        Some(Ok(alignment)) => Ok(alignment),
        Some(Err(reason)) => Err(reason),
        None => try_reads(file),
    }
}

fn ask_statx(file: &File) -> Option<Result<DirectAlignment, String>> {
    let flags = AtFlags::EMPTY_PATH;
    let answer = statx(file.as_fd(), "", flags, StatxFlags::DIOALIGN).ok()?;
    if answer.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    let memory = usize::try_from(answer.stx_dio_mem_align).unwrap_or(usize::MAX);
    let offset = usize::try_from(answer.stx_dio_offset_align).unwrap_or(usize::MAX);
    if memory == 0 || offset == 0 {
        return Some(Err("the file system says that it does none".into()));
    }
    let usable = |alignment: usize| alignment.is_power_of_two() && alignment <= LARGEST_ALIGNMENT;
    if !usable(memory) || !usable(offset) {
        return Some(Err(format!(
            "it needs alignments of {memory} and {offset} bytes"
        )));
    }
    Some(Ok(DirectAlignment { memory, offset }))
}

fn try_reads(file: &File) -> Result<DirectAlignment, String> {
    let mut last = String::from("no alignment up to 4096 bytes works");
    for alignment in [512, 4096] {
        let Some(mut buffer) = AlignedBuffer::new(alignment, alignment) else {
            continue;
        };
        match file.read_at(buffer.as_mut_slice(), 0) {
            Ok(_) => {
                return Ok(DirectAlignment {
                    memory: alignment,
                    offset: alignment,
                });
            }
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

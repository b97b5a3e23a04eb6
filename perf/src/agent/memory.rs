//! The memory of a machine that is itself virtual: its host takes pages that are free back after some
//! seconds, and gives them again when they are touched, which takes some 25 times as long as to clear them.

use std::time::Duration;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// What a guest here takes of the host while it boots, rounded up: huge pages, of which it touches few.
const GUEST_MIB: usize = 16;
const HUGE_PAGE: usize = 2 << 20;
/// Longer than the kernel waits before it tells of free pages (2 s, mm/page_reporting.c).
const TAKEN_BACK_AFTER: Duration = Duration::from_secs(5);

/// What the guests' memory is when they start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// It was free for a while, so that a virtual machine's host has taken it back.
    AsFound,
    /// It was touched just before.
    AtHand,
}

impl Memory {
    pub const ALL: [Self; 2] = [Self::AsFound, Self::AtHand];

    /// What the names of work end with.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::AsFound => "",
            Self::AtHand => ", memory at hand",
        }
    }

    /// Makes the memory for so many guests what it is to be.
    pub async fn prepare(self, guests: usize) -> anyhow::Result<()> {
        match self {
            Self::AsFound => tokio::time::sleep(TAKEN_BACK_AFTER).await,
            Self::AtHand => touch((guests * GUEST_MIB) << 20)?,
        }
        Ok(())
    }
}

/// Takes so much memory and gives it back.
fn touch(length: usize) -> anyhow::Result<()> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, where the kernel has room.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), length, access, MapFlags::PRIVATE)? };
    // SAFETY: the range is the mapping's. Without huge pages it is touched all the same, in part.
    let _ = unsafe { madvise(memory, length, Advice::LinuxHugepage) };
    for offset in (0..length).step_by(HUGE_PAGE) {
        // SAFETY: within the mapping, which nobody else knows.
        unsafe { memory.cast::<u8>().add(offset).write_volatile(1) };
    }
    // SAFETY: nothing refers to it.
    unsafe { munmap(memory, length)? };
    Ok(())
}

//! Defects that a simulation plants, to show that it would find them. Without the feature
//! `planted-bugs` there are none.

/// A defect of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlantedBug {
    /// A member that starts does not know any more whom it voted for.
    DropVote,
    /// A member that starts believes that it has applied one entry less than it has.
    ForgetAppliedIndex,
    /// A member that has started applies its first entry twice.
    ApplyTwice,
    /// A watch that catches up leaves out an event.
    WatchSkipsEvent,
    /// A snapshot lacks its last record.
    SnapshotWithoutLastRecord,
    /// A log that is damaged is cut there, as if its end were torn.
    CutDamagedLog,
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<PlantedBug>> = const { std::cell::Cell::new(None) };
}

/// Plants a defect in every member of this thread, or takes it away.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<PlantedBug>) {
    PLANTED.set(bug);
}

/// Whether a defect is planted.
#[cfg(feature = "planted-bugs")]
pub(crate) fn is_planted(bug: PlantedBug) -> bool {
    PLANTED.get() == Some(bug)
}

/// No defect is planted.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is_planted(_bug: PlantedBug) -> bool {
    false
}

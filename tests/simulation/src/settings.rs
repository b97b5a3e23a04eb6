//! What one run is like: drawn from its seed, so that some runs are all about one thing.

use keelson_member::{Limits, PlantedBug};

use crate::disk::Lie;
use crate::random::Random;

/// Microseconds of a second.
pub const SECOND: u64 = 1_000_000;
/// Microseconds of a millisecond.
pub const MILLISECOND: u64 = 1000;
/// Time of one tick of a member.
pub const TICK: u64 = 100 * MILLISECOND;
/// Ticks until an election.
pub const ELECTION_TICKS: u32 = 10;
/// The server gives up on a request after this: as `keelson-state` does.
pub const SERVER_TIMEOUT: u64 = 5 * SECOND + 2 * ELECTION_TICKS as u64 * TICK;
/// When everything is healed, the cluster has to be whole again within this time.
pub const RECOVERY: u64 = 90 * SECOND;

/// A defect that is planted, to show that the simulation finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plant {
    /// The log's syncs do nothing.
    SkipLogSync,
    /// A sync of the log is done late: with the one after it.
    AcknowledgeBeforeSync,
    /// A linearizable read is answered from what the member has.
    ReadWithoutQuorum,
    /// A new leader revokes every lease.
    RevokeLeasesOnElection,
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

impl Plant {
    /// The member's defect, if it is one.
    pub(crate) fn in_member(self) -> Option<PlantedBug> {
        match self {
            Self::SkipLogSync
            | Self::AcknowledgeBeforeSync
            | Self::ReadWithoutQuorum
            | Self::RevokeLeasesOnElection => None,
            Self::DropVote => Some(PlantedBug::DropVote),
            Self::ForgetAppliedIndex => Some(PlantedBug::ForgetAppliedIndex),
            Self::ApplyTwice => Some(PlantedBug::ApplyTwice),
            Self::WatchSkipsEvent => Some(PlantedBug::WatchSkipsEvent),
            Self::SnapshotWithoutLastRecord => Some(PlantedBug::SnapshotWithoutLastRecord),
            Self::CutDamagedLog => Some(PlantedBug::CutDamagedLog),
        }
    }
}

/// What may happen to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One member, or several, do not reach the others; perhaps in one direction only.
    Partition,
    /// A process is killed (SIGKILL).
    Kill,
    /// A machine loses power in one of its disk's next calls.
    PowerLoss,
    /// Every machine loses power at once.
    Blackout,
    /// A process is stopped for a while (SIGSTOP).
    Pause,
    /// A disk's next sync takes long.
    Stall,
    /// A disk takes no more bytes for a while.
    FullDisk,
    /// A machine's clock jumps ahead.
    ClockJump,
    /// Leadership is handed over.
    Transfer,
    /// Bits of one member's files are flipped, while it runs or is down.
    FlipBits,
}

const FAULTS: [Fault; 10] = [
    Fault::Partition,
    Fault::Kill,
    Fault::PowerLoss,
    Fault::Blackout,
    Fault::Pause,
    Fault::Stall,
    Fault::FullDisk,
    Fault::ClockJump,
    Fault::Transfer,
    Fault::FlipBits,
];

/// One run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Members at the beginning.
    pub members: usize,
    /// Clients that read and write.
    pub clients: usize,
    /// Clients that watch.
    pub watchers: usize,
    /// Clients that hold leases.
    pub lease_holders: usize,
    /// How long there are faults, in microseconds.
    pub duration: u64,
    /// What may happen, and how often: mean time between faults.
    pub faults: Vec<Fault>,
    /// Mean time between faults, in microseconds.
    pub fault_interval: u64,
    /// Whether members come and go.
    pub changes_members: bool,
    /// Percent of messages between members that are lost, come twice, come late.
    pub lost: u64,
    /// See [`Settings::lost`].
    pub repeated: u64,
    /// See [`Settings::lost`].
    pub delayed: u64,
    /// The longest that a client thinks, in microseconds.
    pub think: u64,
    /// Sizes.
    pub limits: Limits,
    /// Percent of writes that compact.
    pub compactions: u64,
    /// What is planted.
    pub plant: Option<Plant>,
}

impl Settings {
    /// Draws a run.
    pub fn draw(random: &mut Random, plant: Option<Plant>) -> Self {
        let all = random.percent(30);
        let faults: Vec<Fault> = FAULTS
            .into_iter()
            .filter(|_| all || random.percent(40))
            .collect();
        // Of a cluster that changes, no more than one of few may be damaged.
        let changes = if faults.contains(&Fault::FlipBits) {
            20
        } else {
            50
        };
        // What only damage shows would need many runs: these are all about it.
        let damage = plant == Some(Plant::CutDamagedLog);
        let faults = if damage {
            vec![
                Fault::FlipBits,
                Fault::FlipBits,
                Fault::Partition,
                Fault::Kill,
            ]
        } else {
            faults
        };
        let calm = random.percent(30);
        let mut percent = |most: u64| if calm { 0 } else { random.below(most + 1) };
        let (lost, repeated, delayed) = (percent(5), percent(5), percent(10));
        Self {
            members: *random.pick(if damage { &[3] } else { &[1, 3, 3, 3, 3, 5] }),
            clients: random.index(4) + 2,
            watchers: random.index(4) + 1,
            lease_holders: random.index(3),
            duration: random.between(10, 25) * SECOND,
            faults,
            fault_interval: random.between(300, 3000) * MILLISECOND,
            changes_members: random.percent(changes) && !damage,
            lost,
            repeated,
            delayed,
            think: random.between(5, 100) * MILLISECOND,
            limits: Limits {
                segment_bytes: 4096 * random.between(6, 40),
                segments: random.index(12) + 4,
                log_cache_bytes: 1024 * (random.index(16) + 1),
                kept_entries: random.between(1, 200),
                flush_bytes: 1024 * (random.index(64) + 2),
                compaction_batch: random.index(40) + 2,
                history_changes: random.index(20) + 1,
                history_bytes: 4096,
                queued_deliveries: random.index(16) + 1,
                verify_blocks: random.between(1, 16),
                verify_pause: u32::try_from(random.between(1, 200)).unwrap_or(1),
                chunk_bytes: 256 * (random.index(16) + 1),
            },
            compactions: random.below(4),
            plant,
        }
    }

    /// How disks lie.
    pub fn lie(&self) -> Lie {
        match self.plant {
            Some(Plant::SkipLogSync) => Lie::SkipsLogSyncs,
            Some(Plant::AcknowledgeBeforeSync) => Lie::LateLogSyncs,
            _ => Lie::None,
        }
    }
}

//! Room on the disk: while a member has too little, it raises the alarm NOSPACE, and lowers it by
//! itself when there is room again.

use std::path::PathBuf;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{AlarmChange, Operation};
use keelson_member::keyspace::Alarm;
use keelson_member::replica::Input;

use crate::disk::Waiting;
use crate::node::Node;

const INTERVAL: Duration = Duration::from_millis(500);
/// Part of the file system that is kept free at most, whatever the flag says.
const LARGEST_PART: u64 = 10;

/// Watches over the room of one folder.
#[derive(Debug)]
pub struct Room {
    /// The data folder.
    pub folder: PathBuf,
    /// Bytes that are to be free: what is in memory still has to go there.
    pub reserve: u64,
    /// Writes without room.
    pub waiting: Waiting,
    /// The member.
    pub member_id: u64,
}

impl Room {
    /// Watches for as long as the node runs.
    pub async fn watch(self, node: Node) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let alarm = Alarm {
            member_id: self.member_id,
            kind: pb::AlarmType::Nospace as i32,
        };
        // An alarm that it finds is its own, of before, unless somebody else raised it.
        loop {
            ticks.tick().await;
            let raised = node.keyspace().has_alarm(alarm);
            let lacking = self.is_lacking(raised);
            node.set_lacks_room(lacking && self.waiting.any());
            if lacking && raised && node.status().is_leader {
                self.hand_over(&node);
            }
            if lacking == raised {
                continue;
            }
            let change = AlarmChange {
                alarm: Some(alarm),
                raised: lacking,
            };
            match node.propose(Operation::Alarm(change), None).await {
                Ok(_) if lacking => tracing::error!(
                    folder = %self.folder.display(),
                    reserve = self.reserve,
                    "the disk is nearly full: the alarm NOSPACE is raised until there is room"
                ),
                Ok(_) => tracing::info!("there is room on the disk again"),
                Err(error) => tracing::warn!(%error, "cannot raise or lower the alarm NOSPACE"),
            }
        }
    }

    /// Whether there is too little room; to lower the alarm, half as much more.
    fn is_lacking(&self, raised: bool) -> bool {
        if self.waiting.any() {
            return true;
        }
        let Ok(file_system) = rustix::fs::statvfs(&self.folder) else {
            return false;
        };
        let block = file_system.f_frsize;
        let free = file_system.f_bavail.saturating_mul(block);
        let whole = file_system.f_blocks.saturating_mul(block);
        let reserve = self.reserve.min(whole / LARGEST_PART);
        free < if raised {
            reserve + reserve / 2
        } else {
            reserve
        }
    }

    /// Lets a member lead that has room.
    fn hand_over(&self, node: &Node) {
        if let Some(to) = node.keyspace().voter_with_room(self.member_id) {
            tracing::info!(to = %format_args!("{to:x}"), "a member with room is to lead");
            node.tell(Input::Transfer(to));
        }
    }
}

//! The orderly end: leadership goes to another member, requests that are under way are answered,
//! what is in memory is flushed, so that the next start is quick.

use std::time::Duration;

use keelson_member::replica::Input;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::maintenance::flush_now;
use crate::node::Node;

/// How long another member may take to lead.
const HAND_OVER: Duration = Duration::from_secs(3);
/// Members that heard of the old leader only go on sending it requests for a moment.
const AFTERWARDS: Duration = Duration::from_millis(300);
/// How long requests may take that are under way.
const REQUESTS: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// Says that the process is about to end.
#[derive(Debug, Clone)]
pub struct Ending(watch::Receiver<bool>);

impl Ending {
    /// Something that ends, and how it is told.
    pub fn new() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// Waits for it.
    pub async fn begins(mut self) {
        // If the sender is gone, the process ends by other ways.
        if self.0.wait_for(|ending| *ending).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Gives leadership to a member that is there, if this one has it.
pub async fn hand_over(node: &Node) {
    if !node.status().is_leader {
        return;
    }
    let moved = async {
        let mut tried = Vec::new();
        while node.status().is_leader {
            let Ok(progress) = node.progress(0).await else {
                return;
            };
            let next = progress.voters.iter().find(|id| !tried.contains(*id));
            let Some(to) = next else {
                return; // nobody else can lead
            };
            tracing::info!(to = %format_args!("{to:x}"), "hands over leadership");
            tried.push(*to);
            node.tell(Input::Transfer(*to));
            for _ in 0..HAND_OVER.as_millis() / (2 * POLL.as_millis()) {
                if !node.status().is_leader {
                    break;
                }
                tokio::time::sleep(POLL).await;
            }
        }
        while node.status().leader == 0 {
            tokio::time::sleep(POLL).await;
        }
        tokio::time::sleep(AFTERWARDS).await;
    };
    if tokio::time::timeout(HAND_OVER, moved).await.is_err() {
        tracing::warn!("no other member has taken over leadership");
    }
}

/// Waits for requests that are under way, up to some seconds; then flushes.
pub async fn wind_up(node: Node, listeners: Vec<JoinHandle<()>>) {
    let all = futures::future::join_all(listeners);
    if tokio::time::timeout(REQUESTS, all).await.is_err() {
        tracing::warn!("some requests were not answered in time");
    }
    let flushed = tokio::task::spawn_blocking({
        let node = node.clone();
        move || flush_now(&node)
    });
    if let Ok(Err(error)) = flushed.await {
        tracing::error!(%error, "the last flush failed");
    }
    node.stop();
}

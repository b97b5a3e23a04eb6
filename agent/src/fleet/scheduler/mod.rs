//! Places guests on hosts. One agent of the fleet does: whichever got the scheduler's key, which is
//! attached to its host's lease. Another one takes over when that ends.

mod decision;
mod destination;
mod leader;
mod resources;
#[cfg(test)]
pub(super) mod tests;
mod view;

pub use decision::Decision;
pub use destination::choose_destination;
#[cfg(test)]
pub use resources::Resources;
pub use view::{View, is_movable};

use futures::StreamExt;
use keelson_controlplane::{
    Compare, CompareOp, KeyRange, PutRequest, RangeRequest, Revision, Txn, TxnResult, WatchRequest,
};

use self::leader::Leader;
use super::keys;
use crate::{Agent, error::Result};

/// How long it waits before it tries again what the store failed to do.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// Places guests whenever it is for this agent to do so. Never ends.
pub async fn run(agent: Agent) {
    loop {
        if let Err(error) = lead_or_wait(&agent).await {
            tracing::warn!(%error, "scheduling failed; trying again");
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Leads until that is over, or waits until nobody leads.
async fn lead_or_wait(agent: &Agent) -> Result<()> {
    let (fleet, _, _) = agent.fleet_parts();
    match campaign(agent).await? {
        Campaign::Won(term) => {
            tracing::info!("this agent places the fleet's guests");
            fleet.set_scheduler(true);
            let led = Leader::lead(agent, term).await;
            fleet.set_scheduler(false);
            tracing::info!("this agent places guests no more");
            led
        }
        Campaign::Lost(revision) => {
            let request = WatchRequest::new(KeyRange::key(keys::scheduler()));
            let mut changes = fleet
                .store()
                .watch(request.from_revision(revision + 1))
                .await?;
            // Whatever happens to the key, it is tried again.
            changes.next().await.transpose()?;
            Ok(())
        }
        Campaign::NoLease => {
            fleet.another_lease(None).await;
            Ok(())
        }
    }
}

/// A term of office: what every write of the scheduler compares.
#[derive(Clone, Debug)]
pub(super) struct Term {
    won_at: Revision,
}

impl Term {
    /// Holds while nobody else has been elected since.
    pub fn compare(&self) -> Compare {
        let key = KeyRange::key(keys::scheduler());
        Compare::create_revision(key, CompareOp::Equal, self.won_at)
    }
}

enum Campaign {
    Won(Term),
    /// Somebody leads, as of this revision.
    Lost(Revision),
    /// This host has no lease, so that nothing could be attached to it.
    NoLease,
}

async fn campaign(agent: &Agent) -> Result<Campaign> {
    let (fleet, _, _) = agent.fleet_parts();
    let (Some(lease), Some(alive)) = (fleet.lease_id(), fleet.lease_check().compare(fleet)) else {
        return Ok(Campaign::NoLease);
    };
    let key = keys::scheduler();
    let put = PutRequest::new(key.clone(), fleet.host()).lease(lease);
    let txn = Txn::new()
        .when([Compare::missing(key.clone()), alive])
        .then([put.into()])
        .or_else([RangeRequest::new(KeyRange::key(key)).into()]);
    let mut answer = fleet.store().txn(txn).await?;
    if answer.succeeded {
        return Ok(Campaign::Won(Term {
            won_at: answer.revision,
        }));
    }
    let found = match answer.results.pop() {
        Some(TxnResult::Range(mut range)) => range.kvs.pop(),
        _ => None,
    };
    Ok(match found {
        // Of this very lease: an answer was lost.
        Some(kv) if kv.lease == lease => Campaign::Won(Term {
            won_at: kv.create_revision,
        }),
        Some(_) => Campaign::Lost(answer.revision),
        None => Campaign::NoLease,
    })
}

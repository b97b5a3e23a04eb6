//! What lets the source's agent send one guest to the destination's: an address and a token, in a key
//! that is attached to the destination's lease.

use keelson_api::API_VERSION;
use keelson_controlplane::{Compare, CompareOp, KeyRange, LeaseId, PutRequest, StateStoreExt};
use serde::{Deserialize, Serialize};

use crate::fleet::Fleet;
use crate::{AgentError, error::Result};

/// What lets the source's agent send one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ticket {
    /// The move's.
    pub id: String,
    /// The destination.
    pub host: String,
    /// Where its agent listens.
    pub address: String,
    /// What it knows the source's agent by; good for one connection.
    pub token: String,
    /// Whether it speaks TLS, and nothing else.
    #[serde(default)]
    pub tls: bool,
    /// The lease that the destination counts on.
    #[serde(skip)]
    lease: Option<LeaseId>,
}

impl Ticket {
    /// A ticket with a token of its own.
    pub fn new(id: &str, host: &str, address: String, tls: bool) -> Self {
        Self {
            id: id.into(),
            host: host.into(),
            address,
            token: new_token(),
            tls,
            lease: None,
        }
    }

    /// Leaves it in the store for as long as this lease lasts.
    ///
    /// # Errors
    /// [`AgentError::State`].
    pub async fn leave(&self, fleet: &Fleet, guest: &str, lease: LeaseId) -> Result<()> {
        let value = serde_json::to_vec(self).map_err(corrupt(guest))?;
        let put = PutRequest::new(key(guest), value).lease(lease);
        fleet.store().put(put).await?;
        Ok(())
    }

    /// The ticket of a guest's move `id`; `None` if the destination has withdrawn it or its lease has
    /// ended.
    ///
    /// # Errors
    /// [`AgentError::State`].
    pub async fn find(fleet: &Fleet, guest: &str, id: &str) -> Result<Option<Self>> {
        let Some(kv) = fleet.store().get(key(guest).as_bytes()).await? else {
            return Ok(None);
        };
        let ticket: Self = serde_json::from_slice(&kv.value).map_err(corrupt(guest))?;
        let ticket = Self {
            lease: Some(kv.lease),
            ..ticket
        };
        Ok(Some(ticket).filter(|ticket| ticket.id == id))
    }

    /// Removes it when it is of no use any more.
    ///
    /// # Errors
    /// [`AgentError::State`]; it ends with the host's lease then.
    pub async fn withdraw(fleet: &Fleet, guest: &str) -> Result<()> {
        fleet.store().remove(key(guest).as_bytes()).await?;
        Ok(())
    }

    /// Holds of a transaction that is done while the destination has the lease on which it prepared
    /// itself.
    pub fn compare(&self) -> Option<Compare> {
        let key = KeyRange::key(crate::fleet::host_key(&self.host));
        Some(Compare::lease(key, CompareOp::Equal, self.lease?))
    }
}

/// 244 random bits, from the kernel.
pub fn new_token() -> String {
    let half = || uuid::Uuid::new_v4().simple().to_string();
    half() + &half()
}

fn key(guest: &str) -> String {
    format!("/{API_VERSION}/migrations/{guest}")
}

fn corrupt(guest: &str) -> impl FnOnce(serde_json::Error) -> AgentError {
    let key = key(guest);
    move |error| AgentError::Corrupt {
        key,
        message: error.to_string(),
    }
}

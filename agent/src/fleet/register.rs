//! How an agent registers its host: a key that only one agent can have, and the `Host` object.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keelson_api::{
    API_VERSION, ConditionStatus, Host, HostSpec, HostStatus, ObjectMeta, set_condition,
};
use keelson_controlplane::{
    Compare, KeyRange, LeaseGrantRequest, LeaseId, PutRequest, RangeRequest, Revision, StateError,
    StateStore, Txn, TxnResult,
};
use serde::{Deserialize, Serialize};

use super::keys;
use crate::config::Config;
use crate::host::{Inventory, write_atomically};
use crate::{Agent, AgentError, error::Result};

/// Who holds a host's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// The host's name in the fleet.
    pub host: String,
    /// The kernel's name of the machine, for people.
    machine: String,
    /// The same for all agents of one run directory since the host booted: they follow one another.
    instance: String,
    /// Since when.
    since: Timestamp,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the agent of the machine {}, instance {}, there since {}",
            self.machine, self.instance, self.since
        )
    }
}

impl Holder {
    /// This agent. What tells it from others is in its run directory.
    ///
    /// # Errors
    /// [`AgentError::Io`] where that can't be read or written.
    pub fn this(config: &Config, inventory: &Inventory) -> Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(AgentError::io("read /proc/sys/kernel/random/boot_id"))?;
        let path = config.run_directory.join("instance");
        let known = fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice::<String>(&text).ok());
        let instance = if let Some(instance) = known {
            instance
        } else {
            let instance = uuid::Uuid::new_v4().simple().to_string();
            write_atomically(&path, &instance)?;
            instance
        };
        Ok(Self {
            host: inventory.hostname.clone(),
            machine: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            // A run directory that outlives the machine's uptime is another one: no guest is left.
            instance: format!("{}-{}", boot.trim(), &instance[..instance.len().min(8)]),
            since: Timestamp::now(),
        })
    }
}

/// What came of registering.
pub enum Registered {
    /// The host is registered, on this lease.
    Done {
        /// The lease.
        lease: LeaseId,
        /// How long it lasts from when it was asked for.
        ttl: Duration,
    },
    /// Another agent has the name.
    Taken {
        /// That agent.
        holder: Holder,
        /// The revision at which it was found.
        revision: Revision,
        /// How long that agent's lease lasts without a renewal.
        ttl: Duration,
    },
}

/// Takes the host's key, attached to a new lease, unless another instance has it.
///
/// # Errors
/// Those of the store. Whatever was done then is found by the next attempt.
pub async fn register(
    store: &Arc<dyn StateStore>,
    holder: &Holder,
    ttl: Duration,
) -> Result<Registered> {
    let key = keys::host(&holder.host);
    let corrupt = |error: serde_json::Error| AgentError::Corrupt {
        key: key.clone(),
        message: error.to_string(),
    };
    let value = serde_json::to_vec(holder).map_err(corrupt)?;
    let granted = store.lease_grant(LeaseGrantRequest::new(ttl)).await?;
    let put = || PutRequest::new(key.clone(), value.clone()).lease(granted.id);
    let done = Registered::Done {
        lease: granted.id,
        ttl: granted.ttl,
    };
    let read = || RangeRequest::new(KeyRange::key(key.clone()));
    let txn = Txn::new()
        .when([Compare::missing(key.clone())])
        .then([put().into()])
        .or_else([read().into()]);
    let mut answer = store.txn(txn).await?;
    if answer.succeeded {
        return Ok(done);
    }
    let found = match answer.results.pop() {
        Some(TxnResult::Range(mut range)) => range.kvs.pop(),
        _ => None,
    };
    let Some(found) = found else {
        return Err(AgentError::Conflict(format!("Host/{}", holder.host)));
    };
    let other: Holder = serde_json::from_slice(&found.value).map_err(corrupt)?;
    if other.instance != holder.instance {
        give_back(store, granted.id).await;
        let ttl = match store.lease_status(found.lease, false).await {
            Ok(status) => status.granted_ttl,
            // It ended just now.
            Err(StateError::LeaseNotFound { .. }) => Duration::ZERO,
            Err(error) => return Err(error.into()),
        };
        return Ok(Registered::Taken {
            holder: other,
            revision: answer.revision,
            ttl,
        });
    }
    // An earlier agent of this run directory, which the directory's lock says is gone.
    let txn = Txn::new()
        .when([Compare::unchanged(key.clone(), found.mod_revision)])
        .then([put().into()]);
    if store.txn(txn).await?.succeeded {
        give_back(store, found.lease).await;
        return Ok(done);
    }
    Err(AgentError::Conflict(format!("Host/{}", holder.host)))
}

/// Ends a lease that is of no use; one that can't be reached ends by itself.
async fn give_back(store: &Arc<dyn StateStore>, lease: LeaseId) {
    match store.lease_revoke(lease).await {
        Ok(_) | Err(StateError::LeaseNotFound { .. }) => {}
        Err(error) => tracing::debug!(%error, "a lease is left to end by itself"),
    }
}

/// Creates the `Host` object, or brings it up to date.
///
/// # Errors
/// Those of the store.
pub async fn report_host(agent: &Agent) -> Result<()> {
    let (fleet, objects, _) = agent.fleet_parts();
    let name = fleet.host();
    let observed = agent.inventory.status(&agent.config);
    let labels = &agent.config.host_labels;
    let update = |host: &mut Host| {
        observe(host, &observed, labels);
    };
    match objects.update::<Host>(name, update).await {
        Err(AgentError::NotFound { .. }) => {}
        other => {
            let host = other?.object;
            fleet.set_use(host.spec);
            return Ok(());
        }
    }
    let mut host = Host {
        api_version: API_VERSION.into(),
        kind: "Host".into(),
        metadata: ObjectMeta {
            uid: uuid::Uuid::new_v4().to_string(),
            generation: 1,
            creation_timestamp: Some(Timestamp::now()),
            ..ObjectMeta::named(name)
        },
        spec: HostSpec::default(),
        status: HostStatus::default(),
    };
    observe(&mut host, &observed, labels);
    objects.create(&host).await
}

fn observe(host: &mut Host, observed: &HostStatus, labels: &BTreeMap<String, String>) {
    let conditions = std::mem::take(&mut host.status.conditions);
    host.status = observed.clone();
    host.status.conditions = conditions;
    host.metadata.labels.extend(
        labels
            .iter()
            .map(|(key, value)| (key.clone(), value.clone())),
    );
    set_condition(
        &mut host.status.conditions,
        "Ready",
        ConditionStatus::True,
        "AgentRuns",
        "its agent is there and renews its lease",
    );
}

//! This host as a member of the fleet: its lease, which its agent renews.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use keelson_api::{HostSpec, Kind, VirtualMachine};
use keelson_controlplane::{
    Compare, CompareOp, KeyRange, LeaseId, StateError, StateStore, StateStoreExt, WatchRequest,
};
use tokio::sync::watch;

use super::claim::is_placed_on;
use super::register::{Holder, Registered, register};
use super::{Guard, Instant, LeaseTerms, keys, scheduler};
use crate::config::Config;
use crate::events::EventRecorder;
use crate::host::Inventory;
use crate::migration::transitions::is_expected_on;
use crate::objects::ObjectStore;
use crate::{Agent, AgentError, error::Result};

/// How long it waits before it tries again what the store failed to do.
const RETRY: Duration = Duration::from_millis(250);
/// How much longer than its lease another agent's key may stay before it is taken for alive.
const PATIENCE: Duration = Duration::from_secs(5);

/// This host as a member of the fleet.
#[derive(Clone, Debug)]
pub struct Fleet {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    host: String,
    ttl: Duration,
    store: Arc<dyn StateStore>,
    /// No other host can use the store, so that there is nothing to agree on.
    exclusive: bool,
    lease: watch::Sender<Option<HostLease>>,
    draining: AtomicBool,
    /// Guests that leave are shut down, not moved while they run.
    no_live_migration: AtomicBool,
    /// This agent places the fleet's guests.
    scheduler: AtomicBool,
    guard: Guard,
}

/// The host's lease, and until when it can be counted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostLease {
    id: LeaseId,
    deadline: Instant,
}

/// Tells whether a lease of the host can be counted on, at any later time. That the host got another one
/// since does not help: in between, its guests may have been placed elsewhere.
#[derive(Clone, Debug)]
pub struct LeaseCheck {
    id: Option<LeaseId>,
    current: watch::Receiver<Option<HostLease>>,
}

impl LeaseCheck {
    /// Whether the lease can be counted on now.
    pub fn holds(&self) -> bool {
        let lease = *self.current.borrow();
        lease.is_some_and(|lease| Some(lease.id) == self.id && Instant::now() < lease.deadline)
    }

    /// Holds of a transaction that is done while this lease lives.
    pub fn compare(&self, fleet: &Fleet) -> Option<Compare> {
        let key = KeyRange::key(keys::host(fleet.host()));
        Some(Compare::lease(key, CompareOp::Equal, self.id?))
    }
}

impl Fleet {
    /// This host, which has not joined yet.
    ///
    /// # Errors
    /// [`AgentError::State`] where the store doesn't answer.
    pub async fn new(
        config: &Config,
        inventory: &Inventory,
        store: Arc<dyn StateStore>,
    ) -> Result<Self> {
        // A store in the agent's own process is locked by it.
        let exclusive = store.status().await?.backend == "embedded";
        Ok(Self {
            inner: Arc::new(Inner {
                host: inventory.hostname.clone(),
                ttl: Duration::from_secs(config.host_lease_seconds),
                store,
                exclusive,
                lease: watch::Sender::new(None),
                draining: AtomicBool::new(false),
                no_live_migration: AtomicBool::new(false),
                scheduler: AtomicBool::new(false),
                guard: Guard::new(config),
            }),
        })
    }

    /// Takes the host's place in the fleet and keeps it; the agent's work may begin when this returns.
    ///
    /// # Errors
    /// [`AgentError::HostNameTaken`] where another agent has the host's name, or those of the store.
    pub async fn join(&self, agent: &Agent) -> Result<()> {
        if self.inner.exclusive {
            return super::register::report_host(agent).await;
        }
        self.inner.guard.adopt().await?;
        let holder = Holder::this(&agent.config, &agent.inventory)?;
        let lease = self.take_place(&holder).await?;
        super::register::report_host(agent).await?;
        tokio::spawn(self.clone().keep_place(agent.clone(), holder, lease));
        tokio::spawn(scheduler::run(agent.clone()));
        Ok(())
    }

    /// This host's name.
    pub fn host(&self) -> &str {
        &self.inner.host
    }

    /// Whether the state store belongs to this host alone.
    pub fn is_exclusive(&self) -> bool {
        self.inner.exclusive
    }

    /// Whether it is for this host's agent to run the guest.
    pub fn is_here(&self, guest: &VirtualMachine) -> bool {
        self.inner.exclusive || is_placed_on(guest, &self.inner.host)
    }

    /// Whether a guest is to come to this host while it runs, and is not placed here yet.
    pub fn is_expected(&self, guest: &VirtualMachine) -> bool {
        is_expected_on(guest, &self.inner.host)
    }

    /// Whether this agent places the fleet's guests.
    pub fn is_scheduler(&self) -> bool {
        self.inner.scheduler.load(Ordering::Relaxed)
    }

    pub(super) fn set_scheduler(&self, scheduler: bool) {
        self.inner.scheduler.store(scheduler, Ordering::Relaxed);
    }

    /// Whether an agent renews the lease of the host `name`.
    ///
    /// # Errors
    /// [`AgentError::State`].
    pub async fn is_registered(&self, name: &str) -> Result<bool> {
        let key = keys::host(name);
        Ok(self.inner.store.get(key.as_bytes()).await?.is_some())
    }

    /// The store, for what is no object.
    pub fn store(&self) -> &Arc<dyn StateStore> {
        &self.inner.store
    }

    /// Whether guests are to leave this host.
    pub fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Relaxed)
    }

    /// Whether guests that are to leave may be moved while they run.
    pub fn drains_live(&self) -> bool {
        !self.inner.no_live_migration.load(Ordering::Relaxed)
    }

    /// Notes what the host is to be used for; whether guests are to leave now that were not, or to stay.
    pub fn set_use(&self, spec: HostSpec) -> bool {
        let no_live = spec.no_live_migration;
        self.inner
            .no_live_migration
            .store(no_live, Ordering::Relaxed);
        self.inner.draining.swap(spec.drain, Ordering::Relaxed) != spec.drain
    }

    /// Whether the lease that the host has now can be counted on, also later.
    pub fn lease_check(&self) -> LeaseCheck {
        LeaseCheck {
            id: self.lease_id(),
            current: self.inner.lease.subscribe(),
        }
    }

    /// The id of the host's lease, if it has one.
    pub fn lease_id(&self) -> Option<LeaseId> {
        (*self.inner.lease.borrow()).map(|lease| lease.id)
    }

    /// How long the lease can be counted on without a renewal.
    pub fn lease_left(&self) -> Option<Duration> {
        (*self.inner.lease.borrow()).map(|lease| lease.deadline.from_now())
    }

    /// Waits until the host has another lease than `before`.
    pub async fn another_lease(&self, before: Option<LeaseId>) {
        let mut changes = self.inner.lease.subscribe();
        let other = |lease: &Option<HostLease>| lease.is_some_and(|lease| Some(lease.id) != before);
        // The sender lives as long as this does.
        let _ = changes.wait_for(other).await;
    }

    /// Sees to it that guests can be started which are killed when the lease ends.
    ///
    /// # Errors
    /// [`AgentError::Process`] where there is no lease, or no guard.
    pub async fn arm_guard(&self) -> Result<()> {
        let lease = *self.inner.lease.borrow();
        match lease {
            Some(lease) if Instant::now() < lease.deadline => {
                self.inner.guard.arm(lease.deadline).await
            }
            _ => Err(AgentError::Process {
                reason: "HostLeaseEnded",
                message:
                    "this host's lease is not renewed, since the state store can't be reached; \
                          the guest may be started elsewhere"
                        .into(),
            }),
        }
    }

    /// Registers, waiting for the lease of an agent that is gone.
    async fn take_place(&self, holder: &Holder) -> Result<LeaseId> {
        let inner = &self.inner;
        let started = Instant::now();
        loop {
            let sent = Instant::now();
            let (other, revision, ttl) = match register(&inner.store, holder, inner.ttl).await? {
                Registered::Done { lease, ttl } => {
                    self.renewed(lease, sent, ttl).await;
                    return Ok(lease);
                }
                Registered::Taken {
                    holder,
                    revision,
                    ttl,
                } => (holder, revision, ttl),
            };
            let limit = started.plus(ttl + PATIENCE);
            let taken = || AgentError::HostNameTaken {
                name: holder.host.clone(),
                other: other.to_string(),
            };
            if limit.from_now().is_zero() {
                return Err(taken());
            }
            tracing::warn!(
                "{}; waiting for {:?} in case that it is gone",
                taken(),
                limit.from_now()
            );
            let key = keys::host(&holder.host);
            let request = WatchRequest::new(KeyRange::key(key));
            let mut changes = inner
                .store
                .watch(request.from_revision(revision + 1))
                .await?;
            if tokio::time::timeout(limit.from_now(), changes.next())
                .await
                .is_err()
            {
                return Err(taken());
            }
        }
    }

    /// Renews the lease, and takes the host's place again where it ended. Never ends.
    async fn keep_place(self, agent: Agent, holder: Holder, mut lease: LeaseId) {
        let inner = &self.inner;
        let mut terms = LeaseTerms::new(inner.ttl);
        let mut pause = terms.renewal_interval();
        let mut reachable = true;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = inner.guard.ended() => {
                    tracing::error!("the guard ended; starting another one");
                }
            }
            let sent = Instant::now();
            match inner.store.lease_keep_alive(lease).await {
                Ok(granted) => {
                    terms = LeaseTerms::new(granted.ttl);
                    pause = terms.renewal_interval();
                    self.renewed(lease, sent, granted.ttl).await;
                    if !std::mem::replace(&mut reachable, true) {
                        tracing::info!("the host's lease is renewed again");
                    }
                }
                Err(StateError::LeaseNotFound { .. }) => {
                    inner.lease.send_replace(None);
                    // The guard has done it, unless somebody revoked the lease.
                    super::guard::fence(&agent.config.run_directory);
                    let message = "the host's lease ended before it was renewed; guests that fail over \
                                   were killed, and may run elsewhere";
                    agent
                        .events
                        .warning(Kind::Host, &inner.host, "LeaseEnded", message)
                        .await;
                    lease = self.take_place_again(&agent, &holder).await;
                    pause = terms.renewal_interval();
                    reachable = true;
                }
                Err(error) => {
                    if std::mem::replace(&mut reachable, false) {
                        let left = self.lease_left().unwrap_or_default();
                        tracing::warn!(
                            %error,
                            "the host's lease can't be renewed; guests that fail over are killed in {left:?}"
                        );
                    }
                    pause = RETRY;
                }
            }
        }
    }

    async fn take_place_again(&self, agent: &Agent, holder: &Holder) -> LeaseId {
        loop {
            match self.take_place(holder).await {
                Ok(lease) => {
                    if let Err(error) = super::register::report_host(agent).await {
                        tracing::warn!(%error, "the host can't be reported");
                    }
                    return lease;
                }
                Err(error) => tracing::error!(%error, "this host has no place in the fleet"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn renewed(&self, id: LeaseId, sent: Instant, ttl: Duration) {
        let deadline = LeaseTerms::new(ttl).deadline(sent);
        // The guard first: what is started because the lease holds must not be killed.
        if let Err(error) = self.inner.guard.renew(deadline).await {
            tracing::error!(%error, "guests that fail over will be killed though the lease was renewed");
            return;
        }
        self.inner
            .lease
            .send_replace(Some(HostLease { id, deadline }));
    }
}

/// What the fleet's tasks work with.
impl Agent {
    pub(super) fn fleet_parts(&self) -> (&Fleet, &ObjectStore, &EventRecorder) {
        (&self.fleet, &self.objects, &self.events)
    }
}

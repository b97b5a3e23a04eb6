//! The agent that places guests, while it does.

use std::collections::BTreeSet;

use futures::StreamExt;
use keelson_api::{ConditionStatus, Host, Kind, Object, VirtualMachine, set_condition};
use keelson_controlplane::{
    Compare, EventKind, StateError, StateStoreExt, WatchBatch, WatchRequest,
};

use super::{Decision, Term, View};
use crate::fleet::keys;
use crate::objects::Change;
use crate::{Agent, AgentError, error::Result};

/// The agent that places guests, while it does.
pub(super) struct Leader<'a> {
    agent: &'a Agent,
    term: Term,
    view: View,
    /// Guests that a change of any host may help: they wait for one, or are on one that is lost.
    unsettled: BTreeSet<String>,
}

impl<'a> Leader<'a> {
    /// Places guests until the term is over or the store fails.
    pub async fn lead(agent: &'a Agent, term: Term) -> Result<()> {
        let (fleet, objects, _) = agent.fleet_parts();
        let world = objects.world().await?;
        let mut changes = objects.watch(None, world.revision).await?;
        let leases = fleet.store().list(keys::hosts().as_bytes()).await?;
        let all_leases = keys::scheduler();
        let all_leases = all_leases.trim_end_matches("scheduler");
        let request = WatchRequest::prefix(all_leases).from_revision(leases.revision + 1);
        let mut lease_changes = fleet.store().watch(request).await?;
        let mut leader = Self {
            agent,
            term,
            view: View::default(),
            unsettled: BTreeSet::new(),
        };
        for kv in &leases.kvs {
            leader.view.set_alive(&host_of(&kv.key), true);
        }
        for stored in world.objects.into_values() {
            leader.view.set(stored.object, stored.revision);
        }
        leader.settle_all().await?;
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(change) => leader.on_change(change?).await?,
                    None => return Ok(()),
                },
                batch = lease_changes.next() => match batch {
                    Some(batch) if Self::is_over(&batch) => return Ok(()),
                    Some(batch) => leader.on_leases(&batch?).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    fn is_over(batch: &Result<WatchBatch, StateError>) -> bool {
        let key = keys::scheduler();
        let mut events = batch.iter().flat_map(|batch| &batch.events);
        events.any(|event| event.kv.key == key && event.kind == EventKind::Delete)
    }

    async fn settle_all(&mut self) -> Result<()> {
        let guests: Vec<_> = self.view.guest_names().cloned().collect();
        for guest in guests {
            self.settle(&guest).await?;
        }
        let hosts: Vec<_> = self.view.host_names().cloned().collect();
        for host in hosts {
            if !self.view.is_alive(&host) {
                self.report_lost(&host).await?;
            }
        }
        Ok(())
    }

    async fn on_change(&mut self, (change, revision): (Change, i64)) -> Result<()> {
        match change {
            Change::Set(object) => {
                let (kind, name) = (object.kind(), object.metadata().name.clone());
                let freed = self.would_free(&object);
                self.view.set(*object, revision);
                match kind {
                    Kind::VirtualMachine => {
                        self.settle(&name).await?;
                        if freed {
                            self.settle_unsettled().await?;
                        }
                    }
                    Kind::Host | Kind::Disk => self.settle_unsettled().await?,
                    Kind::Network | Kind::PortForward | Kind::SecurityGroup | Kind::Service => {}
                }
            }
            Change::Gone(Kind::VirtualMachine, name) => {
                self.view.remove_guest(&name);
                self.unsettled.remove(&name);
                self.settle_unsettled().await?;
            }
            Change::Gone(Kind::Host, name) => {
                self.view.remove_host(&name);
                self.settle_on(&name).await?;
            }
            Change::Gone(..) => {}
        }
        Ok(())
    }

    /// Whether a host has more room after this change of a guest.
    fn would_free(&self, object: &Object) -> bool {
        let Object::VirtualMachine(after) = object else {
            return false;
        };
        let before = self.view.guest(&after.metadata.name);
        let placement = |guest: &VirtualMachine| guest.status.placement.clone();
        before.is_some_and(|(before, _)| {
            before.spec.power_state != after.spec.power_state
                || placement(before) != placement(after)
        })
    }

    async fn on_leases(&mut self, batch: &WatchBatch) -> Result<()> {
        let prefix = keys::hosts();
        for event in &batch.events {
            if !event.kv.key.starts_with(prefix.as_bytes()) {
                continue;
            }
            let host = host_of(&event.kv.key);
            let alive = event.kind == EventKind::Put;
            if !self.view.set_alive(&host, alive) {
                continue;
            }
            if alive {
                self.settle_unsettled().await?;
            } else {
                tracing::warn!(host, "a host's lease has ended");
                // First what is to run elsewhere.
                self.settle_on(&host).await?;
                self.report_lost(&host).await?;
            }
        }
        Ok(())
    }

    async fn settle_on(&mut self, host: &str) -> Result<()> {
        let guests: Vec<_> = self.view.guests_on(host).cloned().collect();
        for guest in guests {
            self.settle(&guest).await?;
        }
        self.settle_unsettled().await
    }

    async fn settle_unsettled(&mut self) -> Result<()> {
        let guests = self.unsettled.clone();
        for guest in guests {
            self.settle(&guest).await?;
        }
        Ok(())
    }

    /// Does for one guest what is to be done. What can't be written, because something changed, is
    /// decided again with that change.
    async fn settle(&mut self, name: &str) -> Result<()> {
        let decision = self.view.decide(name);
        match decision {
            Decision::Nothing | Decision::Remove { .. } | Decision::Rest => {
                self.unsettled.remove(name);
            }
            Decision::Place { .. } | Decision::Wait { .. } | Decision::Stay { .. } => {
                self.unsettled.insert(name.into());
            }
        }
        let Some((guest, revision)) = self.view.guest(name).cloned() else {
            return Ok(());
        };
        let (_, objects, events) = self.agent.fleet_parts();
        let compares = self.compares(&decision);
        if let Decision::Remove { .. } = decision {
            let kind = Kind::VirtualMachine;
            if objects.remove_when(kind, name, revision, &compares).await? {
                let message = "nothing of it was on any host";
                events.normal(kind, name, "Deleted", message).await;
            }
            return Ok(());
        }
        let after = decision.carry_out(&guest);
        if after == guest {
            return Ok(());
        }
        let Some(revision) = objects.replace(&after, revision, &compares).await? else {
            return Ok(());
        };
        self.view.set_guest(after, revision);
        if matches!(decision, Decision::Place { .. }) {
            self.unsettled.remove(name);
        }
        if let Some((expected, reason, message)) = decision.event() {
            // Other guests wait for their places meanwhile.
            let (events, name) = (events.clone(), name.to_owned());
            tokio::spawn(async move {
                let kind = Kind::VirtualMachine;
                if expected {
                    events.normal(kind, &name, reason, message).await;
                } else {
                    events.warning(kind, &name, reason, message).await;
                }
            });
        }
        Ok(())
    }

    /// What has to hold when a decision is written, beside that the guest is as it was: that this agent
    /// is still the one to decide, that the guest's new host has its lease, and that the old one has none.
    fn compares(&self, decision: &Decision) -> Vec<Compare> {
        let mut compares = vec![self.term.compare()];
        match decision {
            Decision::Place { host, lost } => {
                compares.push(Compare::exists(keys::host(host)));
                compares.extend(
                    lost.as_deref()
                        .map(|lost| Compare::missing(keys::host(lost))),
                );
            }
            Decision::Wait {
                lost: Some(host), ..
            }
            | Decision::Remove { lost: Some(host) }
            | Decision::Stay { host, .. } => compares.push(Compare::missing(keys::host(host))),
            _ => {}
        }
        compares
    }

    async fn report_lost(&self, name: &str) -> Result<()> {
        let (_, objects, events) = self.agent.fleet_parts();
        let message =
            "its lease has ended: the host, its agent, or its way to the state store failed";
        let mut known = false;
        let report = |host: &mut Host| {
            let conditions = &mut host.status.conditions;
            known = !set_condition(
                conditions,
                "Ready",
                ConditionStatus::Unknown,
                "LeaseEnded",
                message,
            );
            !known
        };
        let gone = [Compare::missing(keys::host(name)), self.term.compare()];
        match objects.update_when(name, &gone, report).await {
            Ok(Some(_)) => {
                events
                    .warning(Kind::Host, name, "LeaseEnded", message)
                    .await;
                Ok(())
            }
            Ok(None) | Err(AgentError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn host_of(key: &[u8]) -> String {
    let key = String::from_utf8_lossy(key);
    key.strip_prefix(&keys::hosts()).unwrap_or_default().into()
}

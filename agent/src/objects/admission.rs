//! Admission: a manifest is checked whole, against everything there is, before anything of it is
//! written; then it is written whole.

mod addresses;
mod history;
mod place;
mod references;
mod review;

use std::cell::OnceCell;
use std::collections::BTreeSet;

use jiff::Timestamp;
use keelson_api::{Kind, Object, Phase, PowerState, VirtualMachine};
use serde_json::Value;

use self::addresses::wants_allocation;
use self::history::{finish, inherit};
use self::references::references;
use self::review::Review;
use super::allocation::Allocation;
use super::store::{ObjectStore, World};
use crate::fleet::Fleet;
use crate::host::Inventory;
use crate::{AgentError, error::Result};

/// How often admission is tried against others' admissions.
const ATTEMPTS: usize = 20;

/// What applying did to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is new.
    Created,
    /// Its spec or metadata changed.
    Configured,
    /// It was so already.
    Unchanged,
}

/// What applying did to one object of a manifest.
#[derive(Clone, Debug)]
pub struct Applied {
    /// What was done.
    pub action: Action,
    /// The object as it is now.
    pub object: Object,
}

/// Decides on changes of objects.
#[derive(Clone, Copy, Debug)]
pub struct Admission<'a> {
    /// Where the objects are.
    pub objects: &'a ObjectStore,
    /// What this host has.
    pub inventory: &'a Inventory,
    /// This host among others.
    pub fleet: &'a Fleet,
}

impl Admission<'_> {
    /// Creates or replaces all objects of a manifest, or none.
    ///
    /// # Errors
    /// [`AgentError::Manifest`] or [`AgentError::Invalid`] where an object is wrong by itself,
    /// [`AgentError::Precondition`] where it does not fit to the host or to other objects, and
    /// [`AgentError::Conflict`].
    pub async fn apply(&self, documents: &[Value], dry_run: bool) -> Result<Vec<Applied>> {
        let objects = read(documents)?;
        for _ in 0..ATTEMPTS {
            let world = self.objects.world().await?;
            let applied = self.merge(&world, &objects)?;
            let changed: Vec<_> = applied
                .iter()
                .filter(|applied| applied.action != Action::Unchanged)
                .map(|applied| applied.object.clone())
                .collect();
            if dry_run || changed.is_empty() || self.objects.commit(&world, &changed).await? {
                return Ok(applied);
            }
        }
        Err(AgentError::Conflict("the objects".into()))
    }

    /// Deletes an object that nothing refers to. A guest is only marked: it goes when its teardown
    /// is complete.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], [`AgentError::Precondition`] with what refers to it, and
    /// [`AgentError::Conflict`].
    pub async fn delete(&self, kind: Kind, name: &str) -> Result<()> {
        if kind == Kind::VirtualMachine {
            let mark = |guest: &mut VirtualMachine| {
                guest
                    .metadata
                    .deletion_timestamp
                    .get_or_insert_with(Timestamp::now);
            };
            return self.objects.update(name, mark).await.map(drop);
        }
        for _ in 0..ATTEMPTS {
            let world = self.objects.world().await?;
            if !world.objects.contains_key(&(kind, name.into())) {
                return Err(AgentError::NotFound {
                    kind,
                    name: name.into(),
                });
            }
            let users: Vec<_> = world
                .objects
                .values()
                .filter(|stored| references(&stored.object).any(|r| r == (kind, name)))
                .map(|stored| {
                    let name = &stored.object.metadata().name;
                    format!("{}/{name}", stored.object.kind())
                })
                .collect();
            if kind == Kind::Host {
                self.check_host_is_gone(name).await?;
            }
            if !users.is_empty() {
                let users = users.join(", ");
                return Err(AgentError::Precondition(vec![format!(
                    "{kind}/{name} is used by {users}; delete that first"
                )]));
            }
            if self.objects.commit_deletion(&world, kind, name).await? {
                return Ok(());
            }
        }
        Err(AgentError::Conflict(format!("{kind}/{name}")))
    }

    async fn check_host_is_gone(&self, name: &str) -> Result<()> {
        let registered = !self.fleet.is_exclusive() && self.fleet.is_registered(name).await?;
        if registered || name == self.fleet.host() {
            return Err(AgentError::Precondition(vec![format!(
                "Host/{name} has an agent that renews its lease; drain it and stop its agent first"
            )]));
        }
        Ok(())
    }

    /// Gives every object the history and allocations of its predecessor, and checks the result
    /// against the host and against everything else.
    fn merge(&self, world: &World, objects: &[Object]) -> Result<Vec<Applied>> {
        let mut errors = Vec::new();
        let ports = OnceCell::new();
        let ports = self.fleet.is_exclusive().then_some(&ports);
        let mut merged: Vec<_> = objects
            .iter()
            .map(|object| inherit(world, object.clone(), &mut errors))
            .collect();
        let mut after = world.clone();
        for object in &merged {
            let key = (object.kind(), object.metadata().name.clone());
            let revision = after.objects.get(&key).map_or(0, |stored| stored.revision);
            let stored = super::Stored {
                object: object.clone(),
                revision,
            };
            after.objects.insert(key, stored);
        }
        let given: BTreeSet<_> = merged
            .iter()
            .map(|o| (o.kind(), o.metadata().name.clone()))
            .collect();
        let others = after
            .objects
            .iter()
            .filter(|(key, _)| !given.contains(*key));
        let mut review = Review {
            admission: self,
            before: world,
            after: &after,
            ports,
            allocation: Allocation::of(others.map(|(_, stored)| &stored.object)),
        };
        // Those that ask for certain addresses first, so that nobody else is given these.
        let mut order: Vec<&mut Object> = merged.iter_mut().collect();
        order.sort_by_key(|object| wants_allocation(object));
        for object in order {
            let identity = format!("{}/{}", object.kind(), object.metadata().name);
            let mut report = |field: &str, message: String| {
                errors.push(format!("{identity}: {field}: {message}"));
            };
            review.check(object, &mut report);
        }
        if !errors.is_empty() {
            return Err(AgentError::Precondition(errors));
        }
        Ok(merged
            .into_iter()
            .map(|object| finish(world, object))
            .collect())
    }
}

/// Reads and checks the objects of a manifest, each by itself.
fn read(documents: &[Value]) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    let mut errors = Vec::new();
    let mut seen = BTreeSet::new();
    for document in documents {
        let object = Object::from_json(document)?;
        let identity = format!("{}/{}", object.kind(), object.metadata().name);
        errors.extend(
            object
                .validate()
                .iter()
                .map(|error| format!("{identity}: {error}")),
        );
        if !seen.insert(identity.clone()) {
            errors.push(format!(
                "{identity}: metadata.name: stands in the manifest twice"
            ));
        }
        objects.push(object);
    }
    if errors.is_empty() {
        Ok(objects)
    } else {
        Err(AgentError::Invalid(errors))
    }
}

/// Sets the desired power state of a guest.
///
/// # Errors
/// [`AgentError::NotFound`], [`AgentError::Precondition`] where it is being deleted.
pub async fn set_power_state(
    objects: &ObjectStore,
    name: &str,
    power_state: PowerState,
) -> Result<Object> {
    let mut deleting = false;
    let change = |guest: &mut VirtualMachine| {
        deleting = guest.metadata.deletion_timestamp.is_some();
        // A guest that ended by itself should run already; a new generation starts it again.
        let start_again = power_state == PowerState::Running
            && matches!(guest.status.phase, Phase::Stopped | Phase::Failed);
        if !deleting && (guest.spec.power_state != power_state || start_again) {
            guest.spec.power_state = power_state;
            guest.metadata.generation += 1;
        }
    };
    let stored = objects.update(name, change).await?;
    if deleting {
        let message = format!("VirtualMachine/{name} is being deleted");
        return Err(AgentError::Precondition(vec![message]));
    }
    Ok(Object::VirtualMachine(stored.object))
}

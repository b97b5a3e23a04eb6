//! Typed objects over the state store.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use keelson_api::{
    API_VERSION, Disk, Host, Kind, Network, Object, PortForward, Resource, SecurityGroup, Service,
    VirtualMachine,
};
use keelson_controlplane::{
    Compare, DeleteRequest, EventKind, KeyRange, KeyValue, PutRequest, Revision, StateStore,
    StateStoreExt, Swap, Txn, TxnOp, WatchRequest,
};

use crate::{AgentError, error::Result};

/// How often an update of one object is tried against others' updates.
const UPDATE_ATTEMPTS: usize = 20;

/// Typed objects over the state store.
#[derive(Clone, Debug)]
pub struct ObjectStore {
    store: Arc<dyn StateStore>,
}

/// An object and the revision at which it was last changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<T> {
    /// The object; its `resourceVersion` says the same revision.
    pub object: T,
    /// The revision of its last change.
    pub revision: Revision,
}

/// All objects at one revision.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// The objects by kind and name.
    pub objects: BTreeMap<(Kind, String), Stored<Object>>,
    /// The revision.
    pub revision: Revision,
    /// When admission last changed something: 0 if never.
    pub admission_revision: Revision,
}

/// A change of one object that was watched.
#[derive(Clone, Debug)]
pub enum Change {
    /// It was created or changed.
    Set(Box<Object>),
    /// It is gone.
    Gone(Kind, String),
}

impl Change {
    /// The object's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Set(object) => object.kind(),
            Self::Gone(kind, _) => *kind,
        }
    }

    /// The object's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Set(object) => &object.metadata().name,
            Self::Gone(_, name) => name,
        }
    }
}

impl World {
    /// The object of type `T` named `name`.
    pub fn get<T: Resource>(&self, name: &str) -> Option<Object> {
        self.objects
            .get(&(T::KIND, name.into()))
            .map(|stored| stored.object.clone())
    }

    /// All objects of one kind, by name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Stored<Object>> {
        self.objects
            .values()
            .filter(move |stored| stored.object.kind() == kind)
    }
}

impl ObjectStore {
    /// Objects in this store.
    pub fn new(store: Arc<dyn StateStore>) -> Self {
        Self { store }
    }

    /// One object.
    ///
    /// # Errors
    /// [`AgentError::NotFound`] where there is none of that kind and name.
    pub async fn get(&self, kind: Kind, name: &str) -> Result<Stored<Object>> {
        match self.store.get(key(kind, name).as_bytes()).await? {
            Some(kv) => decode(&kv),
            None => Err(AgentError::NotFound {
                kind,
                name: name.into(),
            }),
        }
    }

    /// One object whose kind is known when this is compiled.
    pub async fn get_typed<T: Resource>(&self, name: &str) -> Result<Stored<T>> {
        match self.store.get(key(T::KIND, name).as_bytes()).await? {
            Some(kv) => decode_typed(&kv),
            None => Err(AgentError::NotFound {
                kind: T::KIND,
                name: name.into(),
            }),
        }
    }

    /// All objects of one kind by name, and the revision at which they were read.
    pub async fn list(&self, kind: Kind) -> Result<(Vec<Stored<Object>>, Revision)> {
        let snapshot = self.store.list(kind_prefix(kind).as_bytes()).await?;
        let objects = snapshot.kvs.iter().map(decode).collect::<Result<_>>()?;
        Ok((objects, snapshot.revision))
    }

    /// All objects of all kinds.
    pub async fn world(&self) -> Result<World> {
        let snapshot = self.store.list(objects_prefix().as_bytes()).await?;
        let mut world = World {
            revision: snapshot.revision,
            ..World::default()
        };
        for kv in &snapshot.kvs {
            if kv.key == admission_key() {
                world.admission_revision = kv.mod_revision;
                continue;
            }
            let stored = decode(kv)?;
            let name = stored.object.metadata().name.clone();
            world.objects.insert((stored.object.kind(), name), stored);
        }
        Ok(world)
    }

    /// Writes all `objects`, unless somebody admitted something since `world` was read; then
    /// nothing is written and the answer is `false`. An object whose status changed meanwhile
    /// counts as well.
    pub async fn commit(&self, world: &World, objects: &[Object]) -> Result<bool> {
        let mut txn = Txn::new()
            .when([Compare::unchanged(
                admission_key(),
                world.admission_revision,
            )])
            .then([PutRequest::new(admission_key(), "").into()]);
        for object in objects {
            let name = &object.metadata().name;
            let known = world.objects.get(&(object.kind(), name.clone()));
            let key = key(object.kind(), name);
            txn = txn
                .when([Compare::unchanged(
                    key.as_str(),
                    known.map_or(0, |known| known.revision),
                )])
                .then([TxnOp::from(PutRequest::new(key, encode(object)?))]);
        }
        Ok(self.store.txn(txn).await?.succeeded)
    }

    /// Deletes an object, unless somebody admitted or changed something since `world` was read.
    pub async fn commit_deletion(&self, world: &World, kind: Kind, name: &str) -> Result<bool> {
        let known = world.objects.get(&(kind, name.into()));
        let key = key(kind, name);
        let txn = Txn::new()
            .when([
                Compare::unchanged(admission_key(), world.admission_revision),
                Compare::unchanged(key.as_str(), known.map_or(0, |known| known.revision)),
            ])
            .then([
                PutRequest::new(admission_key(), "").into(),
                DeleteRequest::new(KeyRange::key(key)).into(),
            ]);
        Ok(self.store.txn(txn).await?.succeeded)
    }

    /// Lets `change` change one object, again if others changed it meanwhile. Writes nothing if
    /// the object stays the same.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Conflict`] where others changed it every time.
    pub async fn update<T: Resource>(
        &self,
        name: &str,
        mut change: impl FnMut(&mut T) + Send,
    ) -> Result<Stored<T>> {
        for _ in 0..UPDATE_ATTEMPTS {
            let stored: Stored<T> = self.get_typed(name).await?;
            let mut object = stored.object.clone();
            change(&mut object);
            if object == stored.object {
                return Ok(stored);
            }
            let put = PutRequest::new(key(T::KIND, name), encode(&object)?);
            let key = key(T::KIND, name);
            match self
                .store
                .compare_and_swap(key.as_bytes(), stored.revision, put)
                .await?
            {
                Swap::Done(revision) => {
                    object.metadata_mut().resource_version = revision.to_string();
                    return Ok(Stored { object, revision });
                }
                Swap::Conflict(_) => {}
            }
        }
        Err(AgentError::Conflict(format!("{}/{name}", T::KIND)))
    }

    /// Lets `change` change one object in a transaction that holds only if all of `compares` do, which are
    /// about other keys. Writes also where the object stays the same, so that the comparisons are made.
    /// `None` where one does not hold, or where `change` says that nothing is to be changed.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Conflict`] where others changed it every time.
    pub async fn update_when<T: Resource>(
        &self,
        name: &str,
        compares: &[Compare],
        mut change: impl FnMut(&mut T) -> bool + Send,
    ) -> Result<Option<Stored<T>>> {
        let key = key(T::KIND, name);
        for _ in 0..UPDATE_ATTEMPTS {
            let stored: Stored<T> = self.get_typed(name).await?;
            let mut object = stored.object;
            if !change(&mut object) {
                return Ok(None);
            }
            if let Some(revision) = self.replace(&object, stored.revision, compares).await? {
                object.metadata_mut().resource_version = revision.to_string();
                return Ok(Some(Stored { object, revision }));
            }
            // Was it the object that changed, or does a comparison not hold?
            let now = self.store.get(key.as_bytes()).await?;
            if now.is_some_and(|now| now.mod_revision == stored.revision) {
                return Ok(None);
            }
        }
        Err(AgentError::Conflict(format!("{}/{name}", T::KIND)))
    }

    /// Writes an object that was last changed at `revision`, if all of `compares` hold; the revision, or
    /// `None` if it or one of them has changed.
    pub async fn replace<T: Resource>(
        &self,
        object: &T,
        revision: Revision,
        compares: &[Compare],
    ) -> Result<Option<Revision>> {
        let key = key(T::KIND, &object.metadata().name);
        let txn = Txn::new()
            .when([Compare::unchanged(key.as_str(), revision)])
            .when(compares.iter().cloned())
            .then([PutRequest::new(key, encode(object)?).into()]);
        let answer = self.store.txn(txn).await?;
        Ok(answer.succeeded.then_some(answer.revision))
    }

    /// Removes an object that was last changed at `revision`, if all of `compares` hold; whether it was
    /// removed.
    pub async fn remove_when(
        &self,
        kind: Kind,
        name: &str,
        revision: Revision,
        compares: &[Compare],
    ) -> Result<bool> {
        let key = key(kind, name);
        let txn = Txn::new()
            .when([Compare::unchanged(key.as_str(), revision)])
            .when(compares.iter().cloned())
            .then([DeleteRequest::new(KeyRange::key(key)).into()]);
        Ok(self.store.txn(txn).await?.succeeded)
    }

    /// Writes an object that isn't there yet; one that is stays as it is.
    pub async fn create<T: Resource>(&self, object: &T) -> Result<()> {
        self.replace(object, 0, &[]).await.map(drop)
    }

    /// Removes an object at the end of its teardown. One that is gone already is no error.
    pub async fn remove(&self, kind: Kind, name: &str) -> Result<()> {
        self.store.remove(key(kind, name).as_bytes()).await?;
        Ok(())
    }

    /// Every change of objects after `revision`, of one kind or of all.
    pub async fn watch(
        &self,
        kind: Option<Kind>,
        revision: Revision,
    ) -> Result<impl Stream<Item = Result<(Change, Revision)>> + Send + Unpin + use<>> {
        let prefix = kind.map_or_else(objects_prefix, kind_prefix);
        let batches = self.batches(prefix, revision).await?;
        Ok(batches.flat_map(|batch| {
            let changes: Vec<Result<_>> = match batch {
                Err(error) => vec![Err(error)],
                Ok(batch) => batch.into_iter().map(Ok).collect(),
            };
            futures::stream::iter(changes)
        }))
    }

    /// Every change of objects after `revision`, those of one revision together.
    pub async fn watch_batches(
        &self,
        revision: Revision,
    ) -> Result<impl Stream<Item = Result<Vec<Change>>> + Send + Unpin + use<>> {
        let batches = self.batches(objects_prefix(), revision).await?;
        Ok(batches.map(|batch| {
            let batch = batch?.into_iter();
            Ok(batch.map(|(change, _)| change).collect())
        }))
    }

    async fn batches(
        &self,
        prefix: String,
        revision: Revision,
    ) -> Result<impl Stream<Item = Result<Vec<(Change, Revision)>>> + Send + Unpin + use<>> {
        let request = WatchRequest::prefix(prefix).from_revision(revision + 1);
        let batches = self.store.watch(request).await?;
        Ok(batches.map(|batch| batch?.events.iter().filter_map(change_of).collect()))
    }

    /// The store's location, for people; no passwords.
    pub async fn location(&self) -> Result<String> {
        let status = self.store.status().await?;
        Ok(format!("{}:{}", status.backend, status.location))
    }

    /// Waits for what is being written and closes the store.
    pub async fn close(&self) -> Result<()> {
        Ok(self.store.close().await?)
    }
}

fn objects_prefix() -> String {
    format!("/{API_VERSION}/objects/")
}

fn kind_prefix(kind: Kind) -> String {
    format!("{}{}/", objects_prefix(), kind.plural())
}

fn key(kind: Kind, name: &str) -> String {
    kind_prefix(kind) + name
}

/// Changed with every admission, so that what one admission checked no other can undo meanwhile.
fn admission_key() -> String {
    objects_prefix() + "admission"
}

fn change_of(event: &keelson_controlplane::Event) -> Option<Result<(Change, Revision)>> {
    let revision = event.kv.mod_revision;
    if event.kv.key == admission_key() {
        return None;
    }
    match event.kind {
        EventKind::Put => {
            Some(decode(&event.kv).map(|stored| (Change::Set(Box::new(stored.object)), revision)))
        }
        EventKind::Delete => {
            let (kind, name) = named_by(&event.kv.key)?;
            Some(Ok((Change::Gone(kind, name.into()), revision)))
        }
    }
}

fn encode<T: serde::Serialize>(object: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(object).map_err(|error| AgentError::Io {
        what: "write an object as JSON".into(),
        source: error.into(),
    })
}

fn decode(kv: &KeyValue) -> Result<Stored<Object>> {
    let corrupt = |message: String| AgentError::Corrupt {
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        message,
    };
    let mut object = match decode_as_named(kv) {
        Some(object) => object,
        // Slower, and says what is wrong where.
        None => serde_json::from_slice(&kv.value)
            .map_err(|error| corrupt(error.to_string()))
            .and_then(|value| {
                Object::from_json(&value).map_err(|error| corrupt(error.to_string()))
            })?,
    };
    object.metadata_mut().resource_version = kv.mod_revision.to_string();
    Ok(Stored {
        object,
        revision: kv.mod_revision,
    })
}

/// The object, if it is of the kind that its key says; the key has the version as well.
fn decode_as_named(kv: &KeyValue) -> Option<Object> {
    fn typed<T: Resource>(value: &[u8]) -> Option<Object> {
        let object = serde_json::from_slice::<T>(value).ok();
        object.map(Resource::into_object)
    }
    let (kind, _) = named_by(&kv.key)?;
    match kind {
        Kind::Disk => typed::<Disk>(&kv.value),
        Kind::Host => typed::<Host>(&kv.value),
        Kind::Network => typed::<Network>(&kv.value),
        Kind::PortForward => typed::<PortForward>(&kv.value),
        Kind::SecurityGroup => typed::<SecurityGroup>(&kv.value),
        Kind::Service => typed::<Service>(&kv.value),
        Kind::VirtualMachine => typed::<VirtualMachine>(&kv.value),
    }
}

/// The kind and name of the object at a key.
fn named_by(key: &[u8]) -> Option<(Kind, &str)> {
    let key = std::str::from_utf8(key).ok()?;
    let (plural, name) = key.strip_prefix(&objects_prefix())?.split_once('/')?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.plural() == plural)?;
    Some((kind, name))
}

fn decode_typed<T: Resource>(kv: &KeyValue) -> Result<Stored<T>> {
    let mut object: T = serde_json::from_slice(&kv.value).map_err(|error| AgentError::Corrupt {
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        message: error.to_string(),
    })?;
    object.metadata_mut().resource_version = kv.mod_revision.to_string();
    Ok(Stored {
        object,
        revision: kv.mod_revision,
    })
}

//! Which names belong to which keys, looked up by key.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

/// Which names belong to which keys. Takes room for those only that have any.
#[derive(Debug)]
pub struct Relations<K> {
    names: BTreeMap<K, BTreeSet<String>>,
}

impl<K: Ord> Relations<K> {
    /// Notes that `name` belongs to each of `keys`.
    pub fn add(&mut self, name: &str, keys: impl IntoIterator<Item = K>) {
        for key in keys {
            self.names.entry(key).or_default().insert(name.into());
        }
    }

    /// Notes that `name` belongs to none of `keys`.
    pub fn remove(&mut self, name: &str, keys: impl IntoIterator<Item = K>) {
        for key in keys {
            if let Some(names) = self.names.get_mut(&key) {
                names.remove(name);
                if names.is_empty() {
                    self.names.remove(&key);
                }
            }
        }
    }

    /// The names that belong to a key.
    pub fn of<'a, Q: Ord + ?Sized>(
        &'a self,
        key: &Q,
    ) -> impl Iterator<Item = &'a String> + use<'a, K, Q>
    where
        K: Borrow<Q>,
    {
        self.names.get(key).into_iter().flatten()
    }

    /// Whether any name belongs to a key.
    pub fn has<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.names.contains_key(key)
    }
}

impl<K> Default for Relations<K> {
    fn default() -> Self {
        Self {
            names: BTreeMap::new(),
        }
    }
}

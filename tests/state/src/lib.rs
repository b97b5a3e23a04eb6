//! Servers of etcd's API, for tests: keelson-state, and the etcd that it is compared with.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // A test that can't go on panics.

mod cluster;
mod comparison;
mod random;

pub use self::cluster::{Cluster, Program, address, etcdctl};
pub use self::comparison::{Agreement, compare, number};
pub use self::random::Random;

//! Several hosts on one state store.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use keelson_state_tests::{Cluster, Program};
use keelson_vmm_tests::{Namespaces, wait_until};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Host, Link};

/// How long a host's lease lasts, in seconds: long enough for a machine that is busy.
pub const LEASE_SECONDS: u64 = 10;

/// A cluster of `keelson-state` in namespaces of the test's own, with what clients call its members.
///
/// # Panics
/// If a member doesn't start.
pub fn cluster(members: usize) -> (Namespaces, Cluster, Vec<String>) {
    cluster_with(members, &[])
}

/// As [`cluster`], of members with these flags.
///
/// # Panics
/// If a member doesn't start.
pub fn cluster_with(members: usize, flags: &[&str]) -> (Namespaces, Cluster, Vec<String>) {
    let namespaces = Namespaces::enter_for_agent();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built");
    let cluster = runtime.block_on(Cluster::start(Program::KeelsonState, members, flags));
    let urls = (0..members).map(|at| cluster.client_url(at).to_owned());
    let urls = urls.collect();
    (namespaces, cluster, urls)
}

/// Hosts `a`, `b` and so on, each with a way of its own to the state store, and storage that they share.
pub struct Fleet {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Their ways to the state store.
    pub links: Vec<Link>,
    shared: TempDir,
}

impl Fleet {
    /// Hosts whose agents run, on servers of etcd's API; `scheme` is `etcd` or `cluster`.
    ///
    /// # Panics
    /// If one doesn't start.
    pub fn start<S: AsRef<str>>(
        namespaces: Namespaces,
        count: usize,
        scheme: &str,
        servers: &[S],
    ) -> Self {
        Self::start_with_leases(namespaces, count, scheme, servers, LEASE_SECONDS)
    }

    /// As [`Self::start`], of hosts with networks of their own: the host at `index` has the address
    /// `10.50.0.{index + 1}`, and all are linked by Ethernet.
    ///
    /// # Panics
    /// If one doesn't start.
    pub fn start_apart<S: AsRef<str>>(
        namespaces: Namespaces,
        count: u8,
        scheme: &str,
        servers: &[S],
    ) -> Self {
        let bridge = "underlay";
        namespaces.ip(&["link", "add", bridge, "type", "bridge"]);
        namespaces.ip(&["addr", "add", "10.50.0.254/24", "dev", bridge]);
        namespaces.ip(&["link", "set", bridge, "up"]);
        let mut fleet = Self {
            hosts: Vec::new(),
            links: Vec::new(),
            shared: TempDir::new().expect("there is a place for temporary files"),
        };
        for (index, name) in (1..=count).zip(["a", "b", "c", "d"]) {
            let link = Link::by("10.50.0.254", servers);
            let store = store_url(scheme, &link, LEASE_SECONDS);
            let mut host = Host::of_fleet(namespaces, &store);
            host.set_apart(bridge, &format!("10.50.0.{index}/24"));
            let migration = format!("migration_listen = \"10.50.0.{index}:9470\"\n");
            host.configure(&(settings(name, LEASE_SECONDS) + &migration));
            host.start_agent();
            fleet.hosts.push(host);
            fleet.links.push(link);
        }
        fleet
    }

    /// As [`Self::start`], with leases that last so long.
    ///
    /// # Panics
    /// If one doesn't start.
    pub fn start_with_leases<S: AsRef<str>>(
        namespaces: Namespaces,
        count: usize,
        scheme: &str,
        servers: &[S],
        lease_seconds: u64,
    ) -> Self {
        let mut fleet = Self {
            hosts: Vec::new(),
            links: Vec::new(),
            shared: TempDir::new().expect("there is a place for temporary files"),
        };
        for name in ["a", "b", "c", "d"].iter().take(count) {
            let link = Link::to(servers);
            let store = store_url(scheme, &link, lease_seconds);
            let mut host = Host::of_fleet(namespaces, &store);
            host.configure(&(settings(name, lease_seconds) + &migration_settings()));
            host.start_agent();
            fleet.hosts.push(host);
            fleet.links.push(link);
        }
        fleet
    }

    /// An image on the storage that all hosts share, of a MiB.
    ///
    /// # Panics
    /// If it can't be written.
    pub fn shared_image(&self, name: &str) -> PathBuf {
        let path = self.shared.path().join(name);
        fs::write(&path, vec![0; 1 << 20]).expect("an image can be written");
        path
    }

    /// The index of the host that a guest is placed on, as the host `asked` knows it.
    pub fn place_of(&self, asked: usize, guest: &str) -> Option<usize> {
        let object = self.hosts[asked].object("vm", guest);
        let host = object["status"]["placement"]["host"].as_str()?;
        usize::try_from(u32::from(*host.as_bytes().first()?) - u32::from(b'a')).ok()
    }

    /// Waits until a guest runs; the index of its host.
    ///
    /// # Panics
    /// If it doesn't.
    #[track_caller]
    pub fn wait_until_running(&self, asked: usize, guest: &str) -> usize {
        self.hosts[asked].wait_for_phase(guest, "Running");
        self.place_of(asked, guest).expect("it is placed")
    }

    /// Waits until an event of a guest with this reason is there; its message.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn wait_for_event(&self, asked: usize, guest: &str, reason: &str) -> String {
        wait_until(&format!("event {reason} of {guest}"), || {
            let events = self.hosts[asked].keelson(&["events", guest]).output;
            let line = events.lines().find(|line| line.contains(reason))?;
            Some(line.to_owned())
        })
    }

    /// What the condition `kind` of a host is, as the host `asked` knows it.
    pub fn host_condition(&self, asked: usize, host: &str, kind: &str) -> Value {
        let object = self.hosts[asked].object("host", host);
        let conditions = object["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.unwrap_or_default().into_iter();
        conditions
            .find(|condition| condition["type"] == kind)
            .unwrap_or_default()
    }
}

/// Lets a host take guests that move to it, at a free port.
///
/// # Panics
/// If none is free.
pub fn migration_settings() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    format!("migration_listen = \"{address}\"\n")
}

/// Several tries fit into a lease.
fn store_url(scheme: &str, link: &Link, lease_seconds: u64) -> String {
    format!(
        "{scheme}:{}?timeout_ms={}&connect_timeout_ms={}",
        link.urls(),
        lease_seconds * 150,
        lease_seconds * 50
    )
}

/// The configuration of the host of this name.
pub fn settings(name: &str, lease_seconds: u64) -> String {
    format!(
        "host_name = \"{name}\"\nhost_lease_seconds = {lease_seconds}\nhost_labels = {{ host = \"{name}\" }}\n"
    )
}

/// A `Disk` object that all hosts have.
pub fn shared_disk(name: &str, path: &Path) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Disk\nmetadata: {{name: {name}}}\n\
         spec: {{path: {}, shared: true}}\n",
        path.display()
    )
}

//! The host agent.
//!
//! `keelsond` watches objects in a state store and makes the host match them: it starts a
//! `keelson-vmm` per guest and a `keelson-blk` per disk, prepares TAP devices with eBPF policy, and
//! writes what it observes back to the objects' status. Guests are processes of their own, in
//! control groups of their own: the agent may end, be killed or be replaced at any time, and the
//! next one finds them by the records in its run directory.

pub mod config;
mod connection;
mod error;
mod events;
mod failpoint;
pub mod fleet;
mod guest;
pub mod host;
mod metrics;
mod migration;
mod objects;
mod overlays;
mod reconciler;
mod server;
mod services;
mod uplinks;
mod view;

pub use connection::connect;
pub use error::AgentError;
pub use failpoint::arm_failpoints;
pub use guest::SimulatedGuests;
pub use metrics::serve_metrics;
pub use reconciler::Reconciler;
pub use server::serve;

use std::sync::{Arc, OnceLock};

use keelson_controlplane::StateStore;

use crate::config::Config;
use crate::error::Result;
use crate::events::EventRecorder;
use crate::fleet::Fleet;
use crate::guest::{GuestLayer, GuestProcesses};
use crate::host::{HostNetwork, Inventory};
use crate::migration::{Arrivals, MigrationTls};
use crate::objects::ObjectStore;
use crate::view::SharedView;

/// What every part of the agent works with.
#[derive(Clone, Debug)]
pub struct Agent {
    config: Arc<Config>,
    inventory: Arc<Inventory>,
    network: HostNetwork,
    objects: ObjectStore,
    events: EventRecorder,
    fleet: Fleet,
    guests: Arc<dyn GuestLayer>,
    arrivals: Arrivals,
    migration_tls: Option<MigrationTls>,
    /// What the reconciler knows of all objects.
    view: SharedView,
    /// Keeps other agents out of the run directory for as long as this one lives.
    run_directory: Arc<OnceLock<std::fs::File>>,
}

impl Agent {
    /// Checks the host, opens the state store, and loads or takes over the eBPF programs.
    ///
    /// # Errors
    /// [`AgentError`] that says what the host lacks, or why the store cannot be opened.
    pub async fn open(config: Config) -> Result<Self> {
        host::check_abilities()?;
        create_folders(&config)?;
        let network = HostNetwork::open(&config).await?;
        let store: Arc<dyn StateStore> = keelson_controlplane::open(&config.state).await?;
        Self::assemble(config, store, network, Arc::new(GuestProcesses)).await
    }

    /// An agent of a simulated host, to measure fleets with: all of it is real but for the guests. Hosts
    /// that are simulated on one machine share its `network`.
    ///
    /// # Errors
    /// [`AgentError`] where its folders can't be made, or the store doesn't answer.
    pub async fn simulated(
        config: Config,
        store: Arc<dyn StateStore>,
        network: HostNetwork,
        guests: SimulatedGuests,
    ) -> Result<Self> {
        create_folders(&config)?;
        Self::assemble(config, store, network, Arc::new(guests)).await
    }

    async fn assemble(
        config: Config,
        store: Arc<dyn StateStore>,
        network: HostNetwork,
        guests: Arc<dyn GuestLayer>,
    ) -> Result<Self> {
        let migration_tls = MigrationTls::of(&config)?;
        let inventory = Inventory::read(config.host_name.as_deref())?;
        let fleet = Fleet::new(&config, &inventory, Arc::clone(&store)).await?;
        Ok(Self {
            fleet,
            guests,
            arrivals: Arrivals::default(),
            migration_tls,
            view: SharedView::default(),
            run_directory: Arc::default(),
            config: Arc::new(config),
            inventory: Arc::new(inventory),
            network,
            objects: ObjectStore::new(Arc::clone(&store)),
            events: EventRecorder::new(store),
        })
    }

    /// Takes the run directory, and the host's place among those that share the state store.
    ///
    /// # Errors
    /// [`AgentError::RunDirectoryInUse`], and [`AgentError::HostNameTaken`] where another agent has the
    /// host's name.
    pub async fn join_fleet(&self) -> Result<()> {
        let lock = lock_run_directory(&self.config)?;
        self.run_directory.get_or_init(|| lock);
        self.arrivals.listen(self).await?;
        self.fleet.join(self).await
    }

    /// Closes the state store; guests keep running.
    ///
    /// # Errors
    /// [`AgentError::State`] where the store can't finish what is being written.
    pub async fn close(&self) -> Result<()> {
        self.objects.close().await
    }
}

fn create_folders(config: &Config) -> Result<()> {
    for directory in [&config.run_directory, &config.log_directory] {
        std::fs::create_dir_all(directory)
            .map_err(AgentError::io(format!("create {}", directory.display())))?;
    }
    Ok(())
}

fn lock_run_directory(config: &Config) -> Result<std::fs::File> {
    let path = config.run_directory.join("agent.lock");
    let what = || format!("lock {}", path.display());
    let file = std::fs::File::create(&path).map_err(AgentError::io(what()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(AgentError::RunDirectoryInUse(config.run_directory.clone()))
        }
        Err(std::fs::TryLockError::Error(error)) => Err(AgentError::io(what())(error)),
    }
}

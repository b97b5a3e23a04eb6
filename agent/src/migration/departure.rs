//! The source's side: carries a guest's memory to the destination's agent while the guest runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keelson_api::{Migration, MigrationProgress, VirtualMachine};
use keelson_vmm::api::{MigrationLimits, MigrationPhase, MigrationStatus};
use keelson_vmm::client::VmmClient;
use parking_lot::Mutex;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::connection::{Answer, COPY_BUFFER, Carries, Greeting, VERSION, receive, send};
use super::tls::{self, Connection};
use super::{GuestFlows, MigrationTls, Ring, Ticket, flows, transitions};
use crate::Agent;
use crate::objects::ObjectStore;

/// How often the virtual machine is asked how it gets on: what the guest stands still longer at worst.
const ASK: Duration = Duration::from_millis(10);
/// How often that is written into the guest's object.
const REPORT: Duration = Duration::from_secs(1);
/// How long the virtual machine may take to say why the connection ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

/// How far a departure is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DepartureState {
    /// The guest is being sent.
    Copying,
    /// The other side has all of it, and the guest has stood still for so long.
    Loaded(Duration),
    /// It failed; the guest goes on, unless it has been released.
    Failed(String),
}

/// A guest that is being sent. Dropped, it is canceled, unless its virtual machine has released it.
#[derive(Debug)]
pub struct Departure {
    /// The move's id.
    pub id: String,
    /// What the destination left.
    pub ticket: Ticket,
    state: watch::Receiver<DepartureState>,
    flows: FlowsConnection,
    task: JoinHandle<()>,
}

/// The connection for the guest's flows, from when it is there until it is used.
type FlowsConnection = Arc<Mutex<Option<Connection>>>;

struct Carrier {
    guest: String,
    ticket: Ticket,
    api_socket: PathBuf,
    limits: MigrationLimits,
    objects: ObjectStore,
    tls: Option<MigrationTls>,
    state: watch::Sender<DepartureState>,
    flows: FlowsConnection,
    ring: Ring,
}

impl Departure {
    /// Begins to send the guest whose virtual machine has this API socket.
    pub fn start(
        agent: &Agent,
        guest: &str,
        migration: &Migration,
        ticket: Ticket,
        api_socket: PathBuf,
        ring: Ring,
    ) -> Self {
        let (sender, state) = watch::channel(DepartureState::Copying);
        let flows = FlowsConnection::default();
        let defaults = MigrationLimits::default();
        let carrier = Carrier {
            guest: guest.into(),
            ticket: ticket.clone(),
            api_socket,
            limits: MigrationLimits {
                bandwidth: migration.limits.bytes_per_second,
                downtime_ms: migration
                    .limits
                    .downtime_milliseconds
                    .unwrap_or(defaults.downtime_ms),
                ..defaults
            },
            objects: agent.objects.clone(),
            tls: agent.migration_tls.clone(),
            state: sender,
            flows: Arc::clone(&flows),
            ring,
        };
        Self {
            id: migration.id.clone(),
            ticket,
            state,
            flows,
            task: tokio::spawn(carrier.run()),
        }
    }

    /// How far it is.
    pub fn state(&self) -> DepartureState {
        self.state.borrow().clone()
    }

    /// Sends the flows of the guest, which stands still; how many the other side took.
    ///
    /// # Errors
    /// Why they did not arrive. They can't be sent again.
    pub async fn send_flows(&self, guest_flows: &GuestFlows) -> Result<u32, String> {
        let connection = self.flows.lock().take();
        let mut stream = connection.ok_or("there is no connection for them")?;
        flows::send(&mut stream, guest_flows)
            .await
            .map_err(|error| error.to_string())
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Carrier {
    async fn run(self) {
        let reason = match self.carry().await {
            Ok(reason) | Err(reason) => reason,
        };
        self.enter(DepartureState::Failed(reason));
    }

    fn enter(&self, state: DepartureState) {
        self.state.send_replace(state);
        (self.ring)();
    }

    /// Carries the guest over until the connection ends; why it did.
    async fn carry(&self) -> Result<String, String> {
        let (mut remote, token) = self.connect(Carries::Guest, &self.ticket.token).await?;
        // While the guest runs: it doesn't stand still for this one's greetings.
        let token = token.ok_or("the destination takes no flows")?;
        let (flows, _) = self.connect(Carries::Flows, &token).await?;
        *self.flows.lock() = Some(flows);
        let mut local = self.migrate().await?;
        let status = ask_again_and_again(self.api_socket.clone());
        let copied =
            copy_bidirectional_with_sizes(&mut local, &mut remote, COPY_BUFFER, COPY_BUFFER);
        tokio::select! {
            copied = copied => {
                let way = match copied {
                    Ok(_) => "the connection was closed".to_owned(),
                    Err(error) => error.to_string(),
                };
                Ok(self.last_words(status).await.unwrap_or(way))
            }
            reason = self.watch(status.clone()) => Ok(reason),
            () = self.report(status.clone()) => Ok(String::new()),
        }
    }

    /// A connection, and the token for another one.
    async fn connect(
        &self,
        carries: Carries,
        token: &str,
    ) -> Result<(Connection, Option<String>), String> {
        let ticket = &self.ticket;
        let failed = |error: std::io::Error| {
            format!(
                "the agent of {} at {}: {error}",
                ticket.host, ticket.address
            )
        };
        let connected = tls::connect(self.tls.as_ref(), ticket).await;
        let mut stream = connected.map_err(failed)?;
        let greeting = Greeting {
            version: VERSION,
            guest: self.guest.clone(),
            id: ticket.id.clone(),
            token: token.into(),
            carries,
        };
        send(&mut stream, &greeting).await.map_err(failed)?;
        match receive(&mut stream).await.map_err(failed)? {
            Answer::Welcome { flows_token } => Ok((stream, flows_token)),
            Answer::Refused(reason) => {
                Err(format!("the agent of {} refused: {reason}", ticket.host))
            }
        }
    }

    async fn migrate(&self) -> Result<UnixStream, String> {
        let (socket, limits) = (self.api_socket.clone(), self.limits.clone());
        let asked =
            tokio::task::spawn_blocking(move || VmmClient::connect(socket)?.migrate(limits));
        let stream = asked.await.map_err(|error| error.to_string())?;
        let stream = stream.map_err(|error| error.to_string())?;
        stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .map_err(|error| error.to_string())
    }

    /// Says when the other side has the guest; returns why it failed.
    async fn watch(&self, mut status: watch::Receiver<MigrationStatus>) -> String {
        let mut loaded = false;
        loop {
            let known = status.borrow_and_update().clone();
            match known.phase {
                MigrationPhase::Loaded if !loaded => {
                    loaded = true;
                    let stopped = Duration::from_micros(known.stopped_us.unwrap_or_default());
                    self.enter(DepartureState::Loaded(stopped));
                }
                MigrationPhase::Failed => return known.error.unwrap_or_default(),
                _ => {}
            }
            if status.changed().await.is_err() {
                return "the virtual machine does not answer".into();
            }
        }
    }

    /// Why the virtual machine says that it failed.
    async fn last_words(&self, mut status: watch::Receiver<MigrationStatus>) -> Option<String> {
        let failed = status.wait_for(|status| status.phase == MigrationPhase::Failed);
        let failed = tokio::time::timeout(LAST_WORDS_LIMIT, failed)
            .await
            .ok()?
            .ok()?;
        failed.error.clone()
    }

    /// Writes into the guest's object how it gets on. Never ends.
    async fn report(&self, status: watch::Receiver<MigrationStatus>) {
        loop {
            tokio::time::sleep(REPORT).await;
            let known = status.borrow().clone();
            let progress = MigrationProgress {
                rounds: known.rounds,
                memory_bytes: known.memory_bytes,
                sent_bytes: known.sent_bytes,
                transferred_bytes: known.transferred_bytes,
                remaining_bytes: known.remaining_bytes,
                bytes_per_second: known.bytes_per_second,
            };
            if known.phase != MigrationPhase::Copying {
                continue;
            }
            let id = &self.ticket.id;
            let update = |guest: &mut VirtualMachine| {
                let current = transitions::active(guest).is_some_and(|active| active.id == *id);
                if let Some(migration) = guest.status.migration.as_mut().filter(|_| current) {
                    migration.progress = Some(progress);
                }
            };
            if let Err(error) = self.objects.update(&self.guest, update).await {
                tracing::debug!(guest = self.guest, %error, "progress could not be written");
            }
        }
    }
}

/// Asks a virtual machine how its migration gets on, until nobody wants to know or it doesn't answer.
fn ask_again_and_again(api_socket: PathBuf) -> watch::Receiver<MigrationStatus> {
    let (sender, receiver) = watch::channel(MigrationStatus::default());
    tokio::task::spawn_blocking(move || {
        let Ok(mut client) = VmmClient::connect(api_socket) else {
            return;
        };
        while !sender.is_closed() {
            let Ok(status) = client.migration() else {
                return;
            };
            sender.send_replace(status);
            std::thread::sleep(ASK);
        }
    });
    receiver
}

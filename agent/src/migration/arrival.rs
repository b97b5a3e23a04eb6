//! The destination's side: where guests come in that move to this host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keelson_vmm::api::GuestState;
use keelson_vmm::client::VmmClient;
use parking_lot::Mutex;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::connection::{
    Answer, COPY_BUFFER, Carries, Greeting, OLDEST_VERSION, VERSION, receive, send,
};
use super::ticket::new_token;
use super::tls::{self, Connection};
use super::{MigrationTls, Ring, Ticket, flows};
use crate::failpoint::failpoint;
use crate::host::HostNetwork;
use crate::{Agent, AgentError, error::Result};

/// How many guests may be on their way to a host at once; others wait.
const ARRIVAL_LIMIT: usize = 4;
/// How many connections may be open at once, those included that have not said yet what they want.
const CONNECTION_LIMIT: usize = 32;
/// How often a virtual machine is asked whether its guest has come.
const ASK: Duration = Duration::from_millis(10);
/// How long the listener waits when it can't take a connection.
const RETRY: Duration = Duration::from_millis(100);

/// The guests that are on their way to this host.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    expected: Arc<Mutex<BTreeMap<String, Expected>>>,
}

struct Expected {
    id: String,
    /// Gone when it has been used.
    token: Option<String>,
    /// There from when the other one was used until it is used itself.
    flows_token: Option<String>,
    /// The guest's interfaces.
    interfaces: Vec<String>,
    api_socket: PathBuf,
    state: watch::Sender<ArrivalState>,
    ring: Ring,
}

impl std::fmt::Debug for Expected {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the token.
        formatter
            .debug_struct("Expected")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// How far an arrival is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArrivalState {
    /// The source's agent has not connected, or is sending the guest.
    Coming,
    /// All of the guest is there, since then.
    Arrived(Instant),
    /// The connection ended.
    Ended,
}

/// A guest that is on its way here. Dropped, it is expected no more.
#[derive(Debug)]
pub struct Arrival {
    /// The move's id.
    pub id: String,
    guest: String,
    state: watch::Receiver<ArrivalState>,
    arrivals: Arrivals,
}

impl Arrival {
    /// How far it is.
    pub fn state(&self) -> ArrivalState {
        self.state.borrow().clone()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let mut expected = self.arrivals.expected.lock();
        if expected
            .get(&self.guest)
            .is_some_and(|known| known.id == self.id)
        {
            expected.remove(&self.guest);
        }
    }
}

impl Arrivals {
    /// Listens where the configuration says, if it does.
    ///
    /// # Errors
    /// [`AgentError::Io`] where the address can't be bound.
    pub async fn listen(&self, agent: &Agent) -> Result<()> {
        let Some(address) = agent.config.migration_listen else {
            return Ok(());
        };
        let what = format!("listen on {address} for guests that move here (migration_listen)");
        let listener = TcpListener::bind(address)
            .await
            .map_err(AgentError::io(what))?;
        let host = Host {
            network: agent.network.clone(),
            tls: agent.migration_tls.clone(),
        };
        tokio::spawn(self.clone().accept(listener, host));
        Ok(())
    }

    /// Whether no further guest may be on its way here.
    pub fn is_full(&self) -> bool {
        self.expected.lock().len() >= ARRIVAL_LIMIT
    }

    /// Expects a guest, whose virtual machine waits at this API socket.
    pub fn expect(
        &self,
        guest: &str,
        ticket: &Ticket,
        interfaces: Vec<String>,
        api_socket: PathBuf,
        ring: Ring,
    ) -> Arrival {
        let (sender, state) = watch::channel(ArrivalState::Coming);
        let expected = Expected {
            id: ticket.id.clone(),
            token: Some(ticket.token.clone()),
            flows_token: None,
            interfaces,
            api_socket,
            state: sender,
            ring,
        };
        self.expected.lock().insert(guest.into(), expected);
        Arrival {
            id: ticket.id.clone(),
            guest: guest.into(),
            state,
            arrivals: self.clone(),
        }
    }

    async fn accept(self, listener: TcpListener, host: Host) {
        let permits = Arc::new(Semaphore::new(CONNECTION_LIMIT));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (arrivals, host) = (self.clone(), host.clone());
                    tokio::spawn(async move {
                        if let Err(error) = arrivals.receive(stream, &host).await {
                            tracing::warn!(%error, "a connection that should bring a guest failed");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection that should bring a guest failed");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn receive(&self, stream: TcpStream, host: &Host) -> std::io::Result<()> {
        let mut stream = tls::accept(host.tls.as_ref(), stream).await?;
        let greeting: Greeting = receive(&mut stream).await?;
        let admitted = match self.admit(&greeting) {
            Ok(admitted) => admitted,
            Err(reason) => {
                send(&mut stream, &Answer::Refused(reason.clone())).await?;
                return Err(std::io::Error::other(reason));
            }
        };
        match admitted {
            Admitted::Guest(coming) => {
                let ended = carry(&mut stream, &coming).await;
                // Who expects it decides what becomes of it.
                coming.state.send_replace(ArrivalState::Ended);
                (coming.ring)();
                ended
            }
            Admitted::Flows { interfaces, state } => {
                tokio::select! {
                    ended = take_flows(&mut stream, &host.network, &greeting, &interfaces) => ended,
                    () = state.closed() => Ok(()),
                }
            }
        }
    }

    /// Takes the token of a guest that is expected.
    fn admit(&self, greeting: &Greeting) -> std::result::Result<Admitted, String> {
        if !(OLDEST_VERSION..=VERSION).contains(&greeting.version) {
            return Err(format!(
                "it speaks version {} of the protocol, this agent {OLDEST_VERSION} to {VERSION}",
                greeting.version
            ));
        }
        let mut expected = self.expected.lock();
        // The same words whatever is wrong: whoever has no token learns nothing.
        let refusal = || "no such guest is expected".to_owned();
        let known = expected.get_mut(&greeting.guest).ok_or_else(refusal)?;
        let token = match greeting.carries {
            Carries::Guest => &mut known.token,
            Carries::Flows => &mut known.flows_token,
        };
        if known.id != greeting.id || token.as_ref() != Some(&greeting.token) {
            return Err(refusal());
        }
        *token = None;
        Ok(match greeting.carries {
            Carries::Guest => {
                let flows_token = new_token();
                known.flows_token = Some(flows_token.clone());
                Admitted::Guest(Coming {
                    api_socket: known.api_socket.clone(),
                    state: known.state.clone(),
                    ring: Arc::clone(&known.ring),
                    flows_token,
                })
            }
            Carries::Flows => Admitted::Flows {
                interfaces: known.interfaces.clone(),
                state: known.state.clone(),
            },
        })
    }
}

/// What connections need of the host.
#[derive(Clone)]
struct Host {
    network: HostNetwork,
    tls: Option<MigrationTls>,
}

/// What a connection with the right token brings.
enum Admitted {
    Guest(Coming),
    Flows {
        interfaces: Vec<String>,
        state: watch::Sender<ArrivalState>,
    },
}

/// A guest that comes.
struct Coming {
    api_socket: PathBuf,
    state: watch::Sender<ArrivalState>,
    ring: Ring,
    flows_token: String,
}

/// Waits for the guest's flows and puts them in force, behind interfaces that are still down.
async fn take_flows(
    stream: &mut Connection,
    network: &HostNetwork,
    greeting: &Greeting,
    interfaces: &[String],
) -> std::io::Result<()> {
    let guest = &greeting.guest;
    send(stream, &Answer::Welcome { flows_token: None }).await?;
    let received = flows::receive(stream, greeting.version).await?;
    let mut taken = 0;
    let mut problem = None;
    for (interface, moved) in received.interfaces {
        // An interface that has come or gone since is none that anything could be known of.
        if !interfaces.contains(&interface) {
            continue;
        }
        match network.take_flows(guest, &interface, moved).await {
            Ok(count) => taken += u32::try_from(count).unwrap_or(u32::MAX),
            Err(error) => problem = Some(error.to_string()),
        }
    }
    failpoint(guest, "arrive-flows-taken");
    let outcome = problem.map_or(Ok(taken), Err);
    flows::acknowledge(stream, &outcome).await?;
    outcome.map(drop).map_err(std::io::Error::other)
}

/// Carries what the source sends to the virtual machine that waits, until one of them ends, or the guest
/// isn't expected any more.
async fn carry(stream: &mut Connection, coming: &Coming) -> std::io::Result<()> {
    let socket = coming.api_socket.clone();
    let asked = tokio::task::spawn_blocking(move || VmmClient::connect(socket)?.receive());
    let mut local = match asked.await.map_err(std::io::Error::other)? {
        Ok(local) => {
            local.set_nonblocking(true)?;
            UnixStream::from_std(local)?
        }
        Err(error) => {
            send(stream, &Answer::Refused(error.to_string())).await?;
            return Err(std::io::Error::other(error));
        }
    };
    let flows_token = Some(coming.flows_token.clone());
    send(stream, &Answer::Welcome { flows_token }).await?;
    let arrived = wait_for_guest(coming.api_socket.clone(), &coming.state, &coming.ring);
    let copied = copy_bidirectional_with_sizes(&mut local, stream, COPY_BUFFER, COPY_BUFFER);
    tokio::select! {
        copied = copied => match copied {
            // However the source's agent goes when its guest has gone.
            Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => Err(error),
            _ => Ok(()),
        },
        () = arrived => Ok(()),
        () = coming.state.closed() => Ok(()),
    }
}

/// Says when all of the guest is there. Never ends.
async fn wait_for_guest(api_socket: PathBuf, state: &watch::Sender<ArrivalState>, ring: &Ring) {
    let waiting = tokio::task::spawn_blocking({
        let state = state.clone();
        move || {
            let mut client = VmmClient::connect(api_socket).ok()?;
            while !state.is_closed() {
                match client.status().ok()?.state {
                    GuestState::Arrived => return Some(Instant::now()),
                    GuestState::Incoming => std::thread::sleep(ASK),
                    _ => return None,
                }
            }
            None
        }
    });
    if let Ok(Some(at)) = waiting.await {
        state.send_replace(ArrivalState::Arrived(at));
        ring();
    }
    std::future::pending::<()>().await;
}

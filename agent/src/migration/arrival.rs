//! The destination's side: where guests come in that move to this host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keelson_vmm::api::GuestState;
use keelson_vmm::client::VmmClient;
use parking_lot::Mutex;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::connection::{Answer, Greeting, VERSION, receive, send, watch_over};
use super::{Ring, Ticket};
use crate::config::Config;
use crate::{AgentError, error::Result};

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
    pub async fn listen(&self, config: &Config) -> Result<()> {
        let Some(address) = config.migration_listen else {
            return Ok(());
        };
        let what = format!("listen on {address} for guests that move here (migration_listen)");
        let listener = TcpListener::bind(address)
            .await
            .map_err(AgentError::io(what))?;
        tokio::spawn(self.clone().accept(listener));
        Ok(())
    }

    /// Whether no further guest may be on its way here.
    pub fn is_full(&self) -> bool {
        self.expected.lock().len() >= ARRIVAL_LIMIT
    }

    /// Expects a guest, whose virtual machine waits at this API socket.
    pub fn expect(&self, guest: &str, ticket: &Ticket, api_socket: PathBuf, ring: Ring) -> Arrival {
        let (sender, state) = watch::channel(ArrivalState::Coming);
        let expected = Expected {
            id: ticket.id.clone(),
            token: Some(ticket.token.clone()),
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

    async fn accept(self, listener: TcpListener) {
        let permits = Arc::new(Semaphore::new(CONNECTION_LIMIT));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let arrivals = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = arrivals.receive(stream).await {
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

    async fn receive(&self, mut stream: TcpStream) -> std::io::Result<()> {
        watch_over(&stream)?;
        let greeting: Greeting = receive(&mut stream).await?;
        let (api_socket, state, ring) = match self.admit(&greeting) {
            Ok(admitted) => admitted,
            Err(reason) => {
                send(&mut stream, &Answer::Refused(reason.clone())).await?;
                return Err(std::io::Error::other(reason));
            }
        };
        let ended = carry(&mut stream, api_socket, &state, &ring).await;
        // Who expects it decides what becomes of it.
        state.send_replace(ArrivalState::Ended);
        ring();
        ended
    }

    /// Takes the token of a guest that is expected.
    fn admit(
        &self,
        greeting: &Greeting,
    ) -> std::result::Result<(PathBuf, watch::Sender<ArrivalState>, Ring), String> {
        if greeting.version != VERSION {
            return Err(format!(
                "it speaks version {} of the protocol, this agent {VERSION}",
                greeting.version
            ));
        }
        let mut expected = self.expected.lock();
        // The same words whatever is wrong: whoever has no token learns nothing.
        let refusal = || "no such guest is expected".to_owned();
        let known = expected.get_mut(&greeting.guest).ok_or_else(refusal)?;
        if known.id != greeting.id || known.token.as_ref() != Some(&greeting.token) {
            return Err(refusal());
        }
        known.token = None;
        Ok((
            known.api_socket.clone(),
            known.state.clone(),
            Arc::clone(&known.ring),
        ))
    }
}

/// Carries what the source sends to the virtual machine that waits, until one of them ends, or the guest
/// isn't expected any more.
async fn carry(
    stream: &mut TcpStream,
    api_socket: PathBuf,
    state: &watch::Sender<ArrivalState>,
    ring: &Ring,
) -> std::io::Result<()> {
    let socket = api_socket.clone();
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
    send(stream, &Answer::Welcome).await?;
    let arrived = wait_for_guest(api_socket, state, ring);
    tokio::select! {
        copied = copy_bidirectional(&mut local, stream) => copied.map(drop),
        () = arrived => Ok(()),
        () = state.closed() => Ok(()),
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

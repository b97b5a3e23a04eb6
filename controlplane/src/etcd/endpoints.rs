//! The members of a cluster: which one is asked, and what happens when it fails.

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, ConnectOptions, Error, KvClient, LeaseClient, MaintenanceClient, WatchClient,
};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout_at};

use super::failure::Failure;
use super::namespace::Namespace;
use super::options::{Credentials, EtcdOptions, MAX_ENDPOINTS, MAX_PREFIX_BYTES};
use crate::StateError;
use crate::limits::MAX_RANGE_BYTES;

/// Largest answer decoded, in bytes: what a range may hold, and as much again and more for what is
/// stored beside small keys and values.
const MAX_ANSWER_BYTES: usize = 4 * MAX_RANGE_BYTES;
/// Largest part of a watch's answer, in bytes: etcd splits answers above 2 MiB, but not events,
/// which hold two values at most.
const MAX_WATCH_ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// A connection that carries a request and is silent for this long is asked for a sign of life.
/// etcd closes connections that ask more often than every 5 s.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the sign of life may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after every endpoint has failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether a request may be repeated when it is unknown if it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// It may: it changes nothing, or the same thing.
    Read,
    /// It may not.
    Write,
}

/// The services of one endpoint, over one connection.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) kv: KvClient,
    pub(super) lease: LeaseClient,
    pub(super) maintenance: MaintenanceClient,
}

pub(super) struct Endpoints {
    members: Vec<Endpoint>,
    /// Index of the one that is asked.
    current: AtomicUsize,
    connect: ConnectOptions,
    timeout: Duration,
}

struct Endpoint {
    url: String,
    clients: OnceCell<Clients>,
}

impl Endpoints {
    pub(super) fn new(options: EtcdOptions) -> Result<Self, StateError> {
        check(&options)?;
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.connect_timeout)
            .with_keep_alive(KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT)
            // etcd takes pings on connections without requests for an attack.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others says so instead of keeping requests and watches.
            .with_require_leader(true);
        if let Some(tls) = super::tls::config(&options)? {
            connect = connect.with_tls(tls);
        }
        if let Some(credentials) = &options.credentials {
            let password = password(credentials)?;
            connect = connect
                .with_user(&credentials.user, password)
                // Only requests refused for an expired token are repeated.
                .with_auto_token_refresh(true);
        }
        let urls = options.endpoints.into_iter();
        Ok(Self {
            members: urls
                .map(|url| Endpoint {
                    url,
                    clients: OnceCell::new(),
                })
                .collect(),
            current: AtomicUsize::new(0),
            connect,
            timeout: options.timeout,
        })
    }

    /// Where the store is, for people.
    pub(super) fn location(&self, namespace: &Namespace) -> String {
        let urls: Vec<_> = self.members.iter().map(|one| &one.url[..]).collect();
        let urls = urls.join(",");
        match namespace.prefix() {
            [] => urls,
            prefix => format!("{urls} below {}", prefix.escape_ascii()),
        }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    pub(super) fn url(&self, index: usize) -> &str {
        &self.members[index % self.members.len()].url
    }

    /// Calls one endpoint after the other until one answers, time is over, or it is unknown
    /// whether a write was done.
    pub(super) async fn call<T, F, R>(&self, kind: Call, request: F) -> Result<T, StateError>
    where
        F: Fn(Clients) -> R + Sync,
        R: Future<Output = Result<T, Error>> + Send,
    {
        let deadline = Instant::now() + self.timeout;
        let count = u32::try_from(self.members.len()).unwrap_or(1);
        let mut failures = 0;
        loop {
            // An endpoint that swallows a read leaves time for the others.
            let limit = match kind {
                Call::Read => deadline.min(Instant::now() + self.timeout / count),
                Call::Write => deadline,
            };
            let index = self.current();
            let failure = match self.attempt(index, limit, &request).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            if !matches!(failure, Failure::Refused(_)) {
                self.leave(index);
            }
            let reason = match kind {
                Call::Read => failure.of_read()?,
                Call::Write => failure.of_write()?,
            };
            failures += 1;
            let pause = if failures % count == 0 {
                PAUSE
            } else {
                Duration::ZERO
            };
            if Instant::now() + pause >= deadline {
                let url = self.url(index);
                return Err(StateError::Unavailable(format!("{url}: {reason}")));
            }
            sleep(pause).await;
        }
    }

    async fn attempt<T, F, R>(
        &self,
        index: usize,
        limit: Instant,
        request: &F,
    ) -> Result<T, Failure>
    where
        F: Fn(Clients) -> R + Sync,
        R: Future<Output = Result<T, Error>> + Send,
    {
        let clients = match timeout_at(limit, self.clients(index)).await {
            Ok(clients) => clients?,
            Err(_) => return Err(Failure::NotDone("no answer to the log-in in time".into())),
        };
        match timeout_at(limit, request(clients)).await {
            Ok(answer) => answer.map_err(|error| Failure::of(&error)),
            Err(_) => Err(Failure::Unknown("no answer in time".into())),
        }
    }

    async fn clients(&self, index: usize) -> Result<Clients, Failure> {
        let clients = self.members[index % self.members.len()]
            .clients
            .get_or_try_init(|| async {
                let client = self.dial(index).await?;
                let kv = client.kv_client();
                Ok(Clients {
                    kv: kv.max_decoding_message_size(MAX_ANSWER_BYTES),
                    lease: client.lease_client(),
                    maintenance: client.maintenance_client(),
                })
            });
        clients.await.cloned()
    }

    /// A connection of its own for a watch: on a shared one, a few watches that nobody reads would
    /// use up the flow-control window that requests need as well.
    pub(super) async fn watch_client(&self, index: usize) -> Result<WatchClient, Failure> {
        let client = self.dial(index).await?.watch_client();
        Ok(client.max_decoding_message_size(MAX_WATCH_ANSWER_BYTES))
    }

    /// Makes a client, and logs in if there are credentials; else it connects when it is used.
    async fn dial(&self, index: usize) -> Result<Client, Failure> {
        let connect = self.connect.clone();
        let client = Client::connect([self.url(index)], Some(connect)).await;
        client.map_err(|error| match Failure::of(&error) {
            // Whatever happened to the log-in, the request was not sent.
            Failure::Unknown(reason) => Failure::NotDone(reason),
            failure => failure,
        })
    }

    /// Goes on to the next endpoint, unless another request did.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self
            .current
            .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls = self.members.iter().map(|endpoint| &endpoint.url);
        formatter.debug_list().entries(urls).finish()
    }
}

fn check(options: &EtcdOptions) -> Result<(), StateError> {
    let wrong = |reason: String| {
        Err(StateError::InvalidUrl {
            url: format!("etcd:{}", options.endpoints.join(",")),
            reason,
        })
    };
    if options.endpoints.is_empty() || options.endpoints.len() > MAX_ENDPOINTS {
        return wrong(format!("give 1 to {MAX_ENDPOINTS} endpoints"));
    }
    if options.prefix.len() > MAX_PREFIX_BYTES {
        return wrong(format!(
            "the prefix is longer than {MAX_PREFIX_BYTES} bytes"
        ));
    }
    Ok(())
}

fn password(credentials: &Credentials) -> Result<String, StateError> {
    let path: &Path = &credentials.password_file;
    let text = std::fs::read_to_string(path).map_err(|error| {
        StateError::PermissionDenied(format!("read the password in {}: {error}", path.display()))
    })?;
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

use std::path::PathBuf;
use std::time::Duration;

/// Most endpoints of one store.
pub const MAX_ENDPOINTS: usize = 16;

/// Longest prefix, in bytes. It counts for etcd's limit on the size of a request, not for
/// [`MAX_KEY_BYTES`](crate::limits::MAX_KEY_BYTES).
pub const MAX_PREFIX_BYTES: usize = 256;

/// Most watches of one etcd store at one time; each has a connection of its own.
pub const MAX_WATCHES: usize = 256;

/// How an [`EtcdStore`](super::EtcdStore) is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// `http://HOST:PORT` or `https://HOST:PORT` of one or more members, at most [`MAX_ENDPOINTS`].
    pub endpoints: Vec<String>,
    /// Prepended to every key; at most [`MAX_PREFIX_BYTES`]. Nothing outside of it is read or
    /// changed, except keys attached to a lease that is revoked.
    pub prefix: Vec<u8>,
    /// How long one request may take, attempts at other endpoints included.
    pub timeout: Duration,
    /// How long one attempt to connect may take.
    pub connect_timeout: Duration,
    /// Whom to log in as, if etcd's authentication is enabled.
    pub credentials: Option<Credentials>,
    /// How members with `https://` are told from others.
    pub tls: Tls,
    /// What the servers are.
    pub server: Server,
}

/// Whom to trust, and who to be, where connections are encrypted. The files are read once, when the store
/// is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificates, in PEM, of those that sign the servers' own; the system's where not given.
    pub ca_file: Option<PathBuf>,
    /// What servers that ask for it are shown.
    pub identity: Option<TlsIdentity>,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsIdentity {
    /// The certificate, in PEM, with those between it and the one that is trusted.
    pub cert_file: PathBuf,
    /// Its private key, in PEM.
    pub key_file: PathBuf,
}

/// What speaks etcd's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// etcd itself.
    Etcd,
    /// `keelson-state`.
    KeelsonState,
}

impl Server {
    /// The backend's name: the scheme of its URLs.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::KeelsonState => "cluster",
        }
    }
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// A file with the password; a newline at its end doesn't count. Read once, when the store is
    /// opened.
    pub password_file: PathBuf,
}

impl EtcdOptions {
    /// The defaults: no prefix, 5 s for a request, 2 s to connect, no credentials.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            prefix: Vec::new(),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            credentials: None,
            tls: Tls::default(),
            server: Server::Etcd,
        }
    }
}

//! What can go wrong in the agent.

use std::io;
use std::path::PathBuf;

use keelson_api::{ApiError, Kind};
use keelson_controlplane::StateError;
use keelson_ebpf::DatapathError;

/// What the agent could not do, to what, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration cannot be used.
    #[error("the configuration {}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The host lacks something that guests need.
    #[error("this host can't run guests: {0}")]
    Host(String),
    /// The kernel refused something.
    #[error("could not {what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused a change of its network devices.
    #[error("could not {what}: {source}")]
    Netlink {
        /// What was tried, on what.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// The eBPF programs refused or could not be loaded.
    #[error("the eBPF network: {0}")]
    Datapath(#[from] DatapathError),
    /// The certificates for moves of guests can't be used.
    #[error("the certificates for guests that move (migration_cert_file): {0}")]
    Tls(#[from] keelson_tls::TlsError),
    /// The state store failed.
    #[error("the state store: {0}")]
    State(#[from] StateError),
    /// The manifest cannot be read as objects.
    #[error(transparent)]
    Manifest(#[from] ApiError),
    /// Fields of objects are wrong; one line each.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
    /// Something that an object needs is missing or taken; one line each.
    #[error("{}", .0.join("\n"))]
    Precondition(Vec<String>),
    /// No such object.
    #[error("{kind}/{name} not found; `keelson get {}` lists what there is", kind.short())]
    NotFound {
        /// The kind that was asked for.
        kind: Kind,
        /// The name that was asked for.
        name: String,
    },
    /// Others kept changing the same objects.
    #[error("{0} changed meanwhile, again and again; try once more")]
    Conflict(String),
    /// Another agent has this host's name.
    #[error(
        "the host name {name:?} is taken by {other}; give this host another one (host_name in the \
         configuration), or stop that agent"
    )]
    HostNameTaken {
        /// The name.
        name: String,
        /// Who has it.
        other: String,
    },
    /// Another agent works in the run directory.
    #[error("another agent works in {}; stop it first, or configure another directory", .0.display())]
    RunDirectoryInUse(PathBuf),
    /// What the store holds is not an object.
    #[error("the state store's key {key} holds no object that this version knows: {message}")]
    Corrupt {
        /// The key.
        key: String,
        /// What is wrong with its value.
        message: String,
    },
    /// A guest's process ended or did not become ready.
    #[error("{message}")]
    Process {
        /// One CamelCase word for conditions and events.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

impl AgentError {
    /// Makes an error of a kernel's answer, saying what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// One CamelCase word for conditions and events.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Config { .. } | Self::Tls(_) => "ConfigurationInvalid",
            Self::HostNameTaken { .. } => "HostNameTaken",
            Self::RunDirectoryInUse(_) => "RunDirectoryInUse",
            Self::Host(_) => "HostUnable",
            Self::Io { .. } => "HostFailure",
            Self::Netlink { .. } | Self::Datapath(_) => "NetworkFailure",
            Self::State(_) | Self::Corrupt { .. } => "StateFailure",
            Self::Manifest(_) | Self::Invalid(_) => "Invalid",
            Self::Precondition(_) => "PreconditionFailed",
            Self::NotFound { .. } => "ReferenceMissing",
            Self::Conflict(_) => "Conflict",
            Self::Process { reason, .. } => reason,
        }
    }
}

/// The agent's results.
pub type Result<T, E = AgentError> = std::result::Result<T, E>;

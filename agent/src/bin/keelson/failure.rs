//! Why a command failed, and the exit code that says so to scripts.

use std::fmt;
use std::process::ExitCode;

use keelson_api::ApiError;
use tonic::{Code, Status};

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// Something on this side.
    Other(anyhow::Error),
    /// The manifest can't be read as objects.
    Manifest(ApiError),
    /// What the agent answered.
    Agent(Status),
    /// The time limit passed.
    TimedOut(String),
}

impl Failure {
    /// The exit code, as the help lists them.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Other(_) => 1,
            Self::Manifest(_) => 4,
            Self::TimedOut(_) => 7,
            Self::Agent(status) => match status.code() {
                Code::NotFound => 3,
                Code::InvalidArgument => 4,
                Code::FailedPrecondition => 5,
                Code::Unavailable => 6,
                _ => 1,
            },
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(error) => write!(formatter, "{error:#}"),
            Self::Manifest(error) => write!(formatter, "{error}"),
            Self::TimedOut(message) => formatter.write_str(message),
            // What the agent itself says of what it lacks has no cause in the transport.
            Self::Agent(status) if status.code() == Code::Unavailable && has_cause(status) => {
                write!(
                    formatter,
                    "the agent can't be reached ({}); is keelsond running, and is this its socket?",
                    cause(status)
                )
            }
            Self::Agent(status) => formatter.write_str(status.message()),
        }
    }
}

fn has_cause(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// The innermost reason of a transport failure, which says the most.
fn cause(status: &Status) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    let mut message = status.message().to_owned();
    while let Some(error) = cause {
        message = error.to_string();
        cause = error.source();
    }
    message
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Agent(status)
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Manifest(error)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Other(error.into())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Other(error.into())
    }
}

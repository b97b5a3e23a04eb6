//! What a failed call says about whether the request was done.

use std::error::Error as _;

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::StateError;
use crate::limits::{MAX_RANGE_BYTES, MAX_REQUEST_BYTES, MAX_TXN_OPS};

/// How a call to one endpoint failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server did nothing, and says why; every member would say the same.
    Refused(StateError),
    /// No server was reached, or one that could do nothing now: the request was not done.
    NotDone(String),
    /// The answer is larger than is accepted; the request was done.
    AnswerTooLarge,
    /// The request may have been done.
    Unknown(String),
}

impl Failure {
    pub(super) fn of(error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => Self::of_status(status),
            // The client makes this error of a keep-alive's answer.
            Error::LeaseKeepAliveError(reason) if reason == "lease not found" => {
                Self::Refused(StateError::LeaseNotFound { lease: 0 })
            }
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                Self::Refused(StateError::InvalidArgument(error.to_string()))
            }
            error => Self::Unknown(error.to_string()),
        }
    }

    fn of_status(status: &Status) -> Self {
        if let Some(reason) = connect_error(status) {
            return Self::NotDone(reason);
        }
        Self::of_message(status.code(), status.message())
    }

    /// The messages are those of etcd's `rpctypes/error.go`.
    fn of_message(code: Code, message: &str) -> Self {
        let text = message.strip_prefix("etcdserver: ").unwrap_or(message);
        match text {
            "mvcc: required revision has been compacted" => Self::Refused(StateError::Compacted {
                requested: 0,
                compact_revision: 0,
            }),
            "mvcc: required revision is a future revision" => {
                Self::Refused(StateError::FutureRevision {
                    requested: 0,
                    current: 0,
                })
            }
            "requested lease not found" => Self::Refused(StateError::LeaseNotFound { lease: 0 }),
            "lease already exists" => Self::Refused(StateError::LeaseExists { lease: 0 }),
            "duplicate key given in txn request" => Self::Refused(StateError::DuplicateKey),
            "request is too large" => Self::Refused(request_too_large()),
            "too many operations in txn request" => Self::Refused(StateError::TooLarge {
                what: "transaction in operations",
                size: 0,
                limit: MAX_TXN_OPS,
            }),
            "corrupt cluster" => Self::Refused(StateError::Corrupt(message.into())),
            // Said before the request enters the log.
            "no leader" | "too many requests" | "not capable" | "raft proposal dropped" => {
                Self::NotDone(message.into())
            }
            // A put that is found too large when it is applied is refused with this, but done.
            "mvcc: database space exceeded" => Self::Unknown(format!(
                "{message}: compact and defragment etcd, then disarm its alarm"
            )),
            _ => Self::of_code(code, message),
        }
    }

    fn of_code(code: Code, message: &str) -> Self {
        match code {
            Code::PermissionDenied | Code::Unauthenticated => {
                Self::Refused(StateError::PermissionDenied(message.into()))
            }
            Code::InvalidArgument if message.contains("authentication failed") => {
                Self::Refused(StateError::PermissionDenied(message.into()))
            }
            // Both sides of gRPC have limits of their own.
            Code::OutOfRange if message.contains("decoded message length too large") => {
                Self::AnswerTooLarge
            }
            Code::ResourceExhausted if message.contains("received message larger than max") => {
                Self::Refused(request_too_large())
            }
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::AlreadyExists
            | Code::OutOfRange
                if message.starts_with("etcdserver: ") =>
            {
                Self::Refused(StateError::InvalidArgument(message.into()))
            }
            Code::Unimplemented => Self::Refused(StateError::InvalidArgument(format!(
                "this etcd doesn't know the request: {message}"
            ))),
            code => Self::Unknown(format!("{message} ({code:?})")),
        }
    }

    /// The error of a read, which changes nothing either way, and whether to try it again.
    pub(super) fn of_read(self) -> Result<String, StateError> {
        match self {
            Self::Refused(error) => Err(error),
            Self::AnswerTooLarge => Err(StateError::TooLarge {
                what: "answer in bytes (ask for it in pages)",
                size: 0,
                limit: MAX_RANGE_BYTES,
            }),
            Self::NotDone(reason) | Self::Unknown(reason) => Ok(reason),
        }
    }

    /// The error of a write, or why it can be tried again.
    pub(super) fn of_write(self) -> Result<String, StateError> {
        match self {
            Self::Refused(error) => Err(error),
            Self::NotDone(reason) => Ok(reason),
            Self::AnswerTooLarge => Err(StateError::OutcomeUnknown(
                "its answer is too large to be read".into(),
            )),
            Self::Unknown(reason) => Err(StateError::OutcomeUnknown(reason)),
        }
    }
}

fn request_too_large() -> StateError {
    StateError::TooLarge {
        what: "request in bytes",
        size: 0,
        limit: MAX_REQUEST_BYTES,
    }
}

/// Why the connection couldn't be made, if that is what failed: then nothing was sent.
fn connect_error(status: &Status) -> Option<String> {
    let mut cause = status.source();
    let mut connecting = false;
    let mut reason = status.message().to_owned();
    while let Some(error) = cause {
        connecting = connecting || error.is::<ConnectError>();
        reason = error.to_string();
        cause = error.source();
    }
    connecting.then(|| format!("connect: {reason}"))
}

//! What the writer is asked to do, and its answers.

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::{Lease, LeaseId, LeaseStatus, Revision, StateError, Txn, TxnResponse};

pub(super) enum Command {
    Do {
        request: Request,
        reply: oneshot::Sender<Result<Answer, StateError>>,
        /// Its share of the memory that queued requests may take.
        _permit: OwnedSemaphorePermit,
    },
    Close(oneshot::Sender<Result<(), StateError>>),
}

pub(super) enum Request {
    Txn(Txn),
    Grant { id: Option<LeaseId>, seconds: i64 },
    KeepAlive(LeaseId),
    Revoke(LeaseId),
    LeaseStatus { id: LeaseId, keys: bool },
    Compact(Revision),
}

#[derive(Debug)]
pub(super) enum Answer {
    Txn(TxnResponse),
    Lease(Lease),
    LeaseStatus(LeaseStatus),
    /// The current revision, or that of the change.
    Revision(Revision),
}

impl Command {
    pub(super) fn answer(self, answer: Result<Answer, StateError>) {
        // Whoever asked may be gone.
        match self {
            Self::Do { reply, .. } => drop(reply.send(answer)),
            Self::Close(reply) => drop(reply.send(answer.map(drop))),
        }
    }
}

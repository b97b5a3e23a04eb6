//! Ranges of any size: read in steps between which writes go on, within limits of memory.

use std::sync::Arc;
use std::task::Poll;

use axum::body::{Body, HttpBody};
use axum::http::Response;
use bytes::Bytes;
use http_body::Frame;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::Authority;
use keelson_member::keyspace::RangeReading;
use keelson_member::{Failure, RequestError};
use pb::range_request::{SortOrder, SortTarget};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Services, failed, refused};

/// Answers up to this size need no permission.
const SMALL: usize = 1024 * 1024;
/// Answers up to this size, [`MEDIUM_AT_ONCE`] at once.
const MEDIUM: usize = 8 * 1024 * 1024;
const MEDIUM_AT_ONCE: usize = 8;
/// Bytes of an answer that the connection is given at once.
const PIECE: usize = 64 * 1024;
/// Parts of a stream that wait for the client.
const PARTS: usize = 2;

/// Memory for the answers to large ranges, until clients have taken them: at most
/// `MEDIUM_AT_ONCE * MEDIUM` and one answer of the largest size.
#[derive(Debug, Clone)]
pub struct ResponseMemory {
    medium: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Largest answer, in bytes of keys and values.
    largest: usize,
}

/// What an answer holds of it.
#[derive(Debug, Clone, Default)]
pub struct Held {
    medium: Option<Arc<OwnedSemaphorePermit>>,
    large: Option<Arc<OwnedSemaphorePermit>>,
}

impl Held {
    /// Whether it holds nothing.
    pub fn is_nothing(&self) -> bool {
        self.medium.is_none()
    }
}

impl ResponseMemory {
    /// With a limit of one answer, in bytes.
    pub fn new(largest: usize) -> Self {
        Self {
            medium: Arc::new(Semaphore::new(MEDIUM_AT_ONCE)),
            large: Arc::new(Semaphore::new(1)),
            largest,
        }
    }

    /// Waits until an answer may grow to `bytes`. Who waits holds less than who is waited for.
    async fn grow(&self, held: &mut Held, bytes: usize) -> Result<(), Status> {
        if bytes > self.largest {
            return Err(Status::resource_exhausted(format!(
                "keelson-state: the answer is larger than {} bytes (--max-response-bytes): \
                 use a limit, or RangeStream",
                self.largest
            )));
        }
        if bytes > SMALL && held.medium.is_none() {
            held.medium = Some(permit(&self.medium).await?);
        }
        if bytes > MEDIUM && held.large.is_none() {
            held.large = Some(permit(&self.large).await?);
        }
        Ok(())
    }
}

async fn permit(semaphore: &Arc<Semaphore>) -> Result<Arc<OwnedSemaphorePermit>, Status> {
    let permit = Arc::clone(semaphore).acquire_owned().await;
    permit
        .map(Arc::new)
        .map_err(|_| refused(&RequestError::Stopped))
}

/// Keeps what an answer holds until its body has gone to the client.
pub fn hold(mut response: Response<Body>) -> Response<Body> {
    match response.extensions_mut().remove::<Held>() {
        Some(held) => response.map(|body| {
            Body::new(Holding {
                body,
                rest: Bytes::new(),
                _held: held,
            })
        }),
        None => response,
    }
}

/// A body, and what it holds. It is given away in small pieces: the connection takes the next one
/// when the client has room for it.
struct Holding {
    body: Body,
    rest: Bytes,
    _held: Held,
}

impl HttpBody for Holding {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            let next = std::pin::Pin::new(&mut self.body).poll_frame(context);
            match next.map_ok(Frame::into_data) {
                Poll::Ready(Some(Ok(Ok(data)))) => self.rest = data,
                Poll::Ready(Some(Ok(Err(other)))) => return Poll::Ready(Some(Ok(other))),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
        let length = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(length);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

impl Services {
    /// Reads a range as one answer.
    pub(super) async fn whole_range(
        &self,
        authority: &Authority,
        request: pb::RangeRequest,
    ) -> Result<(pb::RangeResponse, Held), Status> {
        let keyspace = self.node.keyspace();
        let mut held = Held::default();
        let mut reading = keyspace
            .begin_range(authority, request)
            .map_err(|error| refused(&error))?;
        loop {
            match keyspace.read_on(&mut reading) {
                Ok(()) => {}
                // The revision that it began with was compacted since: a newer one does as well.
                Err(Failure::Request(RequestError::Compacted)) if reading.may_begin_again() => {
                    reading.begin_again();
                    continue;
                }
                Err(error) => return Err(failed(error)),
            }
            self.responses.grow(&mut held, reading.bytes()).await?;
            if reading.is_done() {
                return Ok((reading.finish(), held));
            }
            tokio::task::yield_now().await;
        }
    }

    /// Reads a range as a stream of parts, which merged are the answer.
    pub(super) fn streamed_range(
        &self,
        authority: &Authority,
        request: pb::RangeRequest,
    ) -> Result<ReceiverStream<Result<pb::RangeStreamResponse, Status>>, Status> {
        if request.sort_target != SortTarget::Key as i32
            || request.sort_order == SortOrder::Descend as i32
        {
            return Err(Status::invalid_argument(
                "etcdserver: a stream has the order of keys: use Range for another one",
            ));
        }
        let reading = self
            .node
            .keyspace()
            .begin_range(authority, request)
            .map_err(|error| refused(&error))?;
        let (parts, streamed) = mpsc::channel(PARTS);
        let services = self.clone();
        tokio::spawn(async move {
            if let Err(error) = services.send_parts(reading, &parts).await {
                let _ = parts.send(Err(error)).await;
            }
        });
        Ok(ReceiverStream::new(streamed))
    }

    /// As etcd 3.7: the header first, the revision with the first pairs, the count with the last.
    async fn send_parts(
        &self,
        mut reading: RangeReading,
        parts: &mpsc::Sender<Result<pb::RangeStreamResponse, Status>>,
    ) -> Result<(), Status> {
        let part = |range_response| {
            Ok(pb::RangeStreamResponse {
                range_response: Some(range_response),
            })
        };
        let begin = pb::RangeResponse {
            header: self.header(0),
            ..pb::RangeResponse::default()
        };
        if parts.send(part(begin)).await.is_err() {
            return Ok(());
        }
        let mut revision_sent = false;
        let mut taken = 0;
        let mut more = false;
        while !reading.is_done() {
            self.node.keyspace().read_on(&mut reading).map_err(failed)?;
            let (kvs, beyond) = reading.take_part(&mut taken);
            more |= beyond;
            if kvs.is_empty() && !reading.is_done() {
                tokio::task::yield_now().await;
                continue;
            }
            let mut response = pb::RangeResponse {
                kvs,
                ..pb::RangeResponse::default()
            };
            if !revision_sent {
                revision_sent = true;
                response.header = Some(pb::ResponseHeader {
                    revision: reading.revision(),
                    ..pb::ResponseHeader::default()
                });
            }
            if reading.is_done() {
                response.count = reading.count();
                response.more = more;
            }
            if parts.send(part(response)).await.is_err() {
                return Ok(()); // the client is gone
            }
        }
        Ok(())
    }
}

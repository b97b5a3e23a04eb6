//! KV: range, put, delete, transactions, compaction.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::command::{Operation, Response as Outcome};
use pb::kv_server::Kv;
use prost::Message as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::credentials::Credentials;
use super::{Services, failed, refused, unexpected};
use crate::check;

#[tonic::async_trait]
impl Kv for Services {
    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        check::range(&request).map_err(|error| refused(&error))?;
        if !request.serializable {
            self.linearize_keys().await?;
        }
        let authority = self
            .authority(&credentials)
            .map_err(|error| refused(&error))?;
        let (mut response, held) = self.whole_range(&authority, request).await?;
        self.complete(&mut response.header);
        let mut response = Response::new(response);
        if !held.is_nothing() {
            response.extensions_mut().insert(held);
        }
        Ok(response)
    }

    type RangeStreamStream = ReceiverStream<Result<pb::RangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        check::range(&request).map_err(|error| refused(&error))?;
        if !request.serializable {
            self.linearize_keys().await?;
        }
        let authority = self
            .authority(&credentials)
            .map_err(|error| refused(&error))?;
        let parts = self.streamed_range(&authority, request)?;
        Ok(Response::new(parts))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        check::put(&request).map_err(|error| refused(&error))?;
        match self.write(&credentials, Operation::Put(request)).await? {
            Outcome::Put(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        check::delete_range(&request).map_err(|error| refused(&error))?;
        match self
            .write(&credentials, Operation::DeleteRange(request))
            .await?
        {
            Outcome::DeleteRange(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn txn(
        &self,
        request: Request<pb::TxnRequest>,
    ) -> Result<Response<pb::TxnResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        check::txn(&request, self.limits.txn_operations).map_err(|error| refused(&error))?;
        let mut response = if check::is_read_only(&request) {
            if !check::is_serializable(&request) {
                self.linearize_keys().await?;
            }
            let authority = self
                .authority(&credentials)
                .map_err(|error| refused(&error))?;
            self.node
                .keyspace()
                .read_txn(&authority, request)
                .map_err(failed)?
        } else {
            match self.write(&credentials, Operation::Txn(request)).await? {
                Outcome::Txn(response) => response,
                _ => return Err(unexpected()),
            }
        };
        self.complete(&mut response.header);
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        match self
            .write(&credentials, Operation::Compact(request))
            .await?
        {
            Outcome::Compact(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }
}

impl Services {
    /// Waits until a read of keys is current; one that may be wrong is refused. (etcd answers it.)
    async fn linearize_keys(&self) -> Result<(), Status> {
        self.linearize().await?;
        if self.node.keyspace().is_corrupt() {
            return Err(refused(&RequestError::Corrupt));
        }
        Ok(())
    }

    /// Replicates an operation, if it is not too large.
    pub(super) async fn write(
        &self,
        credentials: &Credentials,
        operation: Operation,
    ) -> Result<Outcome, Status> {
        let size = match &operation {
            Operation::Put(request) => request.key.len() + request.value.len(),
            Operation::Txn(request) => request.encoded_len(),
            _ => 0,
        };
        if size > self.limits.request_bytes {
            return Err(refused(&RequestError::RequestTooLarge));
        }
        self.refuse_learner()?;
        let authority = self
            .authority(credentials)
            .map_err(|error| refused(&error))?;
        if operation.grows() && self.node.refuses_growth() {
            return Err(refused(&RequestError::NoSpace));
        }
        self.node
            .propose(operation, Some(authority))
            .await
            .map_err(|error| refused(&error))
    }
}

//! KV: range, put, delete, transactions, compaction.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::command::{Operation, Response as Outcome};
use pb::kv_server::Kv;
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{Services, failed, refused, unexpected};
use crate::check;

#[tonic::async_trait]
impl Kv for Services {
    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let request = request.into_inner();
        check::range(&request).map_err(|error| refused(&error))?;
        if !request.serializable {
            self.linearize().await?;
        }
        let mut response = self.node.keyspace().range(&request).map_err(failed)?;
        self.complete(&mut response.header);
        Ok(Response::new(response))
    }

    type RangeStreamStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<pb::RangeStreamResponse, Status>>>;

    async fn range_stream(
        &self,
        _request: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented(
            "RangeStream is of etcd 3.7: use Range with a limit",
        ))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let request = request.into_inner();
        check::put(&request).map_err(|error| refused(&error))?;
        match self.write(Operation::Put(request)).await? {
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
        let request = request.into_inner();
        check::delete_range(&request).map_err(|error| refused(&error))?;
        match self.write(Operation::DeleteRange(request)).await? {
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
        let request = request.into_inner();
        check::txn(&request, self.limits.txn_operations).map_err(|error| refused(&error))?;
        let mut response = if check::is_read_only(&request) {
            if !check::is_serializable(&request) {
                self.linearize().await?;
            }
            self.node.keyspace().read_txn(request).map_err(failed)?
        } else {
            match self.write(Operation::Txn(request)).await? {
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
        let request = request.into_inner();
        match self.write(Operation::Compact(request)).await? {
            Outcome::Compact(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }
}

impl Services {
    /// Replicates an operation, if it is not too large.
    pub(super) async fn write(&self, operation: Operation) -> Result<Outcome, Status> {
        let size = match &operation {
            Operation::Put(request) => request.key.len() + request.value.len(),
            Operation::Txn(request) => request.encoded_len(),
            _ => 0,
        };
        if size > self.limits.request_bytes {
            return Err(refused(&RequestError::RequestTooLarge));
        }
        self.refuse_learner()?;
        self.node
            .propose(operation)
            .await
            .map_err(|error| refused(&error))
    }
}

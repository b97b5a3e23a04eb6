//! Locks that the server waits for (`v3lock`).

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::v3lockpb as lockpb;
use keelson_member::command::Operation;
use lockpb::lock_server::Lock;
use tonic::{Request, Response, Status};

use super::Services;

#[tonic::async_trait]
impl Lock for Services {
    async fn lock(
        &self,
        request: Request<lockpb::LockRequest>,
    ) -> Result<Response<lockpb::LockResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        let (place, _) = self
            .enqueue(&credentials, &request.name, request.lease, Bytes::new())
            .await?;
        if !place.wait().await? {
            return Err(Status::unknown("mutex: session is expired"));
        }
        let key = place.key.clone();
        place.keep();
        Ok(Response::new(lockpb::LockResponse {
            header: self.current_header(),
            key,
        }))
    }

    async fn unlock(
        &self,
        request: Request<lockpb::UnlockRequest>,
    ) -> Result<Response<lockpb::UnlockResponse>, Status> {
        let credentials = self.credentials(&request);
        let delete = pb::DeleteRangeRequest {
            key: request.into_inner().key,
            ..pb::DeleteRangeRequest::default()
        };
        crate::check::delete_range(&delete).map_err(|error| super::refused(&error))?;
        self.write(&credentials, Operation::DeleteRange(delete))
            .await?;
        Ok(Response::new(lockpb::UnlockResponse {
            header: self.current_header(),
        }))
    }
}

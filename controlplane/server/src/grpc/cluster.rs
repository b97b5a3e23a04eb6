//! Members.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::{ChangeKind, MembershipChange, RequestError};
use pb::cluster_server::Cluster;
use tonic::{Request, Response, Status};

use super::{Services, refused};
use crate::identity;

#[tonic::async_trait]
impl Cluster for Services {
    async fn member_add(
        &self,
        _request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        // It would have nothing to begin with, and its vote would count.
        Err(Status::unimplemented(
            "members can't be added in this version: name all of them when the cluster begins",
        ))
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        let member = self.known(request.into_inner().id)?;
        Ok(Response::new(pb::MemberRemoveResponse {
            members: self.change(ChangeKind::Remove, member).await?,
            header: self.current_header(),
        }))
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        let request = request.into_inner();
        if request.peer_ur_ls.is_empty()
            || !request.peer_ur_ls.iter().all(|url| identity::is_url(url))
        {
            return Err(refused(&RequestError::BadPeerUrls));
        }
        let mut member = self.known(request.id)?;
        member.peer_urls = request.peer_ur_ls;
        Ok(Response::new(pb::MemberUpdateResponse {
            members: self.change(ChangeKind::Update, member).await?,
            header: self.current_header(),
        }))
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        if request.into_inner().linearizable {
            self.node
                .read_barrier()
                .await
                .map_err(|error| refused(&error))?;
        }
        let members = self.node.keyspace().metadata().members;
        Ok(Response::new(pb::MemberListResponse {
            header: self.current_header(),
            members: members.into_iter().map(described).collect(),
        }))
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        let mut member = self.known(request.into_inner().id)?;
        if !member.is_learner {
            return Err(refused(&RequestError::NotLearner));
        }
        let (caught_up, _) = self
            .node
            .progress(member.id)
            .await
            .map_err(|error| refused(&error))?;
        if !caught_up {
            return Err(refused(&RequestError::LearnerNotReady));
        }
        member.is_learner = false;
        Ok(Response::new(pb::MemberPromoteResponse {
            members: self.change(ChangeKind::Promote, member).await?,
            header: self.current_header(),
        }))
    }
}

impl Services {
    fn known(&self, id: u64) -> Result<MemberInfo, Status> {
        let members = self.node.keyspace().metadata().members;
        members
            .into_iter()
            .find(|member| member.id == id)
            .ok_or_else(|| refused(&RequestError::MemberNotFound))
    }

    async fn change(
        &self,
        kind: ChangeKind,
        member: MemberInfo,
    ) -> Result<Vec<pb::Member>, Status> {
        let change = MembershipChange {
            id: 0,
            kind: kind.into(),
            member: Some(member),
        };
        let members = self
            .node
            .change(change)
            .await
            .map_err(|error| refused(&error))?;
        Ok(members.into_iter().map(described).collect())
    }
}

fn described(member: MemberInfo) -> pb::Member {
    pb::Member {
        id: member.id,
        name: member.name,
        peer_ur_ls: member.peer_urls,
        client_ur_ls: member.client_urls,
        is_learner: member.is_learner,
    }
}

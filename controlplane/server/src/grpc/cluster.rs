//! Members.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::replica::Progress;
use keelson_member::replica::membership::{check_adding_voter, check_removing_voter};
use keelson_member::{ChangeKind, MembershipChange, RequestError};
use pb::cluster_server::Cluster;
use tonic::{Request, Response, Status};

use super::{Services, refused};
use crate::identity;

#[tonic::async_trait]
impl Cluster for Services {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        self.require_admin(&request)?;
        let request = request.into_inner();
        check_urls(&request.peer_ur_ls)?;
        self.linearize().await?;
        let members = self.node.keyspace().metadata().members;
        if request.is_learner {
            let learners = members.iter().filter(|member| member.is_learner).count();
            if learners >= self.limits.learners {
                return Err(refused(&RequestError::TooManyLearners));
            }
        } else {
            let active = self.progress(0).await?.active;
            check_adding_voter(&members, &active).map_err(|error| refused(&error))?;
        }
        let member = MemberInfo {
            id: identity::new_member_id(),
            peer_urls: request.peer_ur_ls,
            is_learner: request.is_learner,
            ..MemberInfo::default()
        };
        let members = self.change(ChangeKind::Add, member.clone()).await?;
        Ok(Response::new(pb::MemberAddResponse {
            header: self.current_header(),
            member: Some(described(member)),
            members,
        }))
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        self.require_admin(&request)?;
        self.linearize().await?;
        let member = self.known(request.into_inner().id)?;
        if !member.is_learner {
            let active = self.progress(0).await?.active;
            let members = self.node.keyspace().metadata().members;
            check_removing_voter(&members, member.id, &active).map_err(|error| refused(&error))?;
        }
        Ok(Response::new(pb::MemberRemoveResponse {
            members: self.change(ChangeKind::Remove, member).await?,
            header: self.current_header(),
        }))
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        self.require_admin(&request)?;
        let request = request.into_inner();
        check_urls(&request.peer_ur_ls)?;
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
            self.linearize().await?;
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
        self.require_admin(&request)?;
        self.linearize().await?;
        let mut member = self.known(request.into_inner().id)?;
        if !member.is_learner {
            return Err(refused(&RequestError::NotLearner));
        }
        if !self.progress(member.id).await?.caught_up {
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

    async fn progress(&self, id: u64) -> Result<Progress, Status> {
        match self.node.progress(id).await {
            Err(RequestError::NotLeader) => self.peers.progress(&self.node, id).await,
            other => other,
        }
        .map_err(|error| refused(&error))
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

fn check_urls(urls: &[String]) -> Result<(), Status> {
    if urls.is_empty() || !urls.iter().all(|url| identity::is_url(url)) {
        return Err(refused(&RequestError::BadPeerUrls));
    }
    Ok(())
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

//! Status, alarms, hashes, leadership.

use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{AlarmChange, Operation};
use keelson_member::keyspace::Alarm;
use keelson_member::replica::Input;
use keelson_member::{MemberError, RequestError};
use pb::alarm_request::AlarmAction;
use pb::maintenance_server::Maintenance;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::credentials::Credentials;
use super::{ETCD_VERSION, Services, failed, refused};
use crate::maintenance::flush_now;
use crate::snapshot::BackupReader;

/// Parts of a backup that wait for the client.
const SNAPSHOT_PARTS: usize = 4;
/// How often a transfer of leadership is looked at.
const TRANSFER_POLL: Duration = Duration::from_millis(50);
/// How long it may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(5);

#[tonic::async_trait]
impl Maintenance for Services {
    async fn alarm(
        &self,
        request: Request<pb::AlarmRequest>,
    ) -> Result<Response<pb::AlarmResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        let alarm = Alarm {
            member_id: request.member_id,
            kind: request.alarm,
        };
        let raised = self.node.keyspace().metadata().alarms;
        let matching = |other: &Alarm| {
            (request.member_id == 0 || other.member_id == request.member_id)
                && (request.alarm == pb::AlarmType::None as i32 || other.kind == request.alarm)
        };
        let alarms = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => raised.into_iter().filter(matching).collect(),
            Ok(AlarmAction::Activate) => {
                self.set_alarm(&credentials, alarm, true).await?;
                vec![alarm]
            }
            Ok(AlarmAction::Deactivate) => {
                let ending: Vec<Alarm> = raised.into_iter().filter(matching).collect();
                for alarm in &ending {
                    self.set_alarm(&credentials, *alarm, false).await?;
                }
                ending
            }
            Err(_) => return Err(Status::invalid_argument("etcdserver: unknown alarm action")),
        };
        Ok(Response::new(pb::AlarmResponse {
            header: self.current_header(),
            alarms: alarms.into_iter().map(described).collect(),
        }))
    }

    async fn status(
        &self,
        _request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let status = self.node.status();
        let keyspace = self.node.keyspace();
        let metadata = keyspace.metadata();
        let size = keyspace.size().map_err(|error| failed(error.into()))?;
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let mut errors: Vec<String> = metadata
            .alarms
            .iter()
            .map(|alarm| format!("{alarm:?}"))
            .collect();
        if status.leader == 0 {
            errors.push(RequestError::NoLeader.to_string());
        }
        Ok(Response::new(pb::StatusResponse {
            header: self.header(metadata.revision),
            version: ETCD_VERSION.into(),
            db_size: size,
            leader: status.leader,
            raft_index: status.committed,
            raft_term: status.term,
            raft_applied_index: status.applied,
            errors,
            db_size_in_use: size,
            is_learner: metadata
                .members
                .iter()
                .any(|member| member.id == self.member_id && member.is_learner),
            ..pb::StatusResponse::default()
        }))
    }

    async fn defragment(
        &self,
        request: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, Status> {
        self.require_admin(&request)?;
        // Freed pages are used again; nothing has to stop for that.
        Ok(Response::new(pb::DefragmentResponse { header: None }))
    }

    async fn hash(
        &self,
        request: Request<pb::HashRequest>,
    ) -> Result<Response<pb::HashResponse>, Status> {
        self.require_admin(&request)?;
        let (hash, _, _) = self.node.keyspace().hash(0).map_err(failed)?;
        Ok(Response::new(pb::HashResponse {
            header: self.current_header(),
            hash,
        }))
    }

    async fn hash_kv(
        &self,
        request: Request<pb::HashKvRequest>,
    ) -> Result<Response<pb::HashKvResponse>, Status> {
        self.require_admin(&request)?;
        let revision = request.into_inner().revision;
        let (hash, hash_revision, compact_revision) =
            self.node.keyspace().hash(revision).map_err(failed)?;
        Ok(Response::new(pb::HashKvResponse {
            header: self.current_header(),
            hash,
            compact_revision,
            hash_revision,
        }))
    }

    type SnapshotStream = ReceiverStream<Result<pb::SnapshotResponse, Status>>;

    async fn snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        self.require_admin(&request)?;
        let (parts, streamed) = mpsc::channel(SNAPSHOT_PARTS);
        let services = self.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = services.send_backup(&parts) {
                let _ = parts.blocking_send(Err(failed(error.into())));
            }
        });
        Ok(Response::new(ReceiverStream::new(streamed)))
    }

    async fn move_leader(
        &self,
        request: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, Status> {
        self.require_admin(&request)?;
        let target = request.into_inner().target_id;
        if !self.node.status().is_leader {
            return Err(refused(&RequestError::NotLeader));
        }
        let members = self.node.keyspace().metadata().members;
        if !members
            .iter()
            .any(|member| member.id == target && !member.is_learner)
        {
            return Err(refused(&RequestError::BadTransferee));
        }
        self.node.tell(Input::Transfer(target));
        let moved = async {
            while self.node.status().leader != target {
                tokio::time::sleep(TRANSFER_POLL).await;
            }
        };
        if tokio::time::timeout(TRANSFER_TIMEOUT, moved).await.is_err() {
            return Err(refused(&RequestError::TimedOut));
        }
        Ok(Response::new(pb::MoveLeaderResponse {
            header: self.current_header(),
        }))
    }

    async fn downgrade(
        &self,
        _request: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, Status> {
        Err(Status::unimplemented("there is no older version to go to"))
    }
}

impl Services {
    /// Streams a backup of everything that is applied, until the client is gone.
    fn send_backup(
        &self,
        parts: &mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
    ) -> Result<(), MemberError> {
        flush_now(&self.node)?;
        let mut reader = BackupReader::new(self.node.keyspace().snapshot()?);
        // The stream's length is not known before its end: this much is left at most, or so.
        let mut remaining = self.node.keyspace().size()?;
        while let Some(blob) = reader.next_part()? {
            remaining = remaining.saturating_sub(blob.len() as u64);
            let part = pb::SnapshotResponse {
                header: self.current_header(),
                remaining_bytes: remaining,
                blob: blob.into(),
                version: ETCD_VERSION.into(),
            };
            if parts.blocking_send(Ok(part)).is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn set_alarm(
        &self,
        credentials: &Credentials,
        alarm: Alarm,
        raised: bool,
    ) -> Result<(), Status> {
        let change = AlarmChange {
            alarm: Some(alarm),
            raised,
        };
        self.write(credentials, Operation::Alarm(change))
            .await
            .map(drop)
    }
}

fn described(alarm: Alarm) -> pb::AlarmMember {
    pb::AlarmMember {
        member_id: alarm.member_id,
        alarm: alarm.kind,
    }
}

//! Reading and changing objects.

use std::pin::Pin;

use futures::{Stream, StreamExt, TryStreamExt};
use keelson_api::proto::apply_result::Action as ProtoAction;
use keelson_api::proto::objects_server::Objects;
use keelson_api::proto::watch_event::Type;
use keelson_api::proto::{
    ApplyRequest, ApplyResponse, ApplyResult, DeleteRequest, DeleteResponse, GetRequest,
    ListRequest, ListResponse, Object, WatchEvent, WatchRequest,
};
use keelson_api::{ApiError, manifest};
use tonic::{Request, Response, Status};

use super::{parse_kind, status, stored_to_proto, to_proto};
use crate::failpoint::failpoint;
use crate::objects::{Action, Admission, Change};
use crate::{Agent, AgentError};

/// Reading and changing objects.
#[derive(Debug)]
pub struct ObjectsService {
    agent: Agent,
}

impl ObjectsService {
    /// The service of this agent.
    pub fn new(agent: Agent) -> Self {
        Self { agent }
    }

    fn admission(&self) -> Admission<'_> {
        Admission {
            objects: &self.agent.objects,
            inventory: &self.agent.inventory,
            fleet: &self.agent.fleet,
        }
    }
}

#[tonic::async_trait]
impl Objects for ObjectsService {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let request = request.into_inner();
        if request.documents.len() > manifest::STEP_LIMIT {
            let error = ApiError::TooLarge {
                what: "the number of objects",
                size: request.documents.len(),
                limit: manifest::STEP_LIMIT,
            };
            return Err(status(AgentError::Manifest(error)));
        }
        let documents: Vec<_> = request
            .documents
            .iter()
            .map(|document| serde_json::from_slice(document))
            .collect::<Result<_, _>>()
            .map_err(|error| Status::invalid_argument(format!("a document is no JSON: {error}")))?;
        let applied = self
            .admission()
            .apply(&documents, request.dry_run)
            .await
            .map_err(status)?;
        for applied in &applied {
            failpoint(&applied.object.metadata().name, "apply-committed");
        }
        let mut results = Vec::new();
        for applied in applied {
            let action = match applied.action {
                Action::Created => ProtoAction::Created,
                Action::Configured => ProtoAction::Configured,
                Action::Unchanged => ProtoAction::Unchanged,
            };
            let object = Some(to_proto(&applied.object)?);
            results.push(ApplyResult {
                action: action.into(),
                object,
            });
        }
        Ok(Response::new(ApplyResponse { results }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Object>, Status> {
        let request = request.into_inner();
        let kind = parse_kind(&request.kind)?;
        let stored = self
            .agent
            .objects
            .get(kind, &request.name)
            .await
            .map_err(status)?;
        Ok(Response::new(stored_to_proto(&stored)?))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let kind = parse_kind(&request.into_inner().kind)?;
        let (objects, revision) = self.agent.objects.list(kind).await.map_err(status)?;
        let objects = objects
            .iter()
            .map(stored_to_proto)
            .collect::<Result<_, _>>()?;
        Ok(Response::new(ListResponse { objects, revision }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        let kind = parse_kind(&request.kind)?;
        self.admission()
            .delete(kind, &request.name)
            .await
            .map_err(status)?;
        Ok(Response::new(DeleteResponse {}))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let kind = parse_kind(&request.kind)?;
        let (objects, revision) = self.agent.objects.list(kind).await.map_err(status)?;
        let changes = self
            .agent
            .objects
            .watch(Some(kind), revision)
            .await
            .map_err(status)?;
        let name = request.name;
        let wanted = move |other: &str| name.is_empty() || name == other;
        let present: Vec<_> = objects
            .iter()
            .filter(|stored| wanted(&stored.object.metadata().name))
            .map(|stored| Ok(event(Type::Added, Some(stored_to_proto(stored)?))))
            .chain([Ok(event(Type::Bookmark, None))])
            .collect();
        let changes = changes.map_err(status).try_filter_map(move |(change, _)| {
            let event = wanted(change.name())
                .then(|| change_event(&change))
                .transpose();
            std::future::ready(event)
        });
        Ok(Response::new(
            futures::stream::iter(present).chain(changes).boxed(),
        ))
    }
}

fn event(kind: Type, object: Option<Object>) -> WatchEvent {
    WatchEvent {
        r#type: kind.into(),
        object,
    }
}

fn change_event(change: &Change) -> Result<WatchEvent, Status> {
    match change {
        Change::Set(object) => Ok(event(Type::Modified, Some(to_proto(object)?))),
        Change::Gone(kind, name) => {
            let object = Object {
                kind: kind.to_string(),
                name: name.clone(),
                ..Object::default()
            };
            Ok(event(Type::Deleted, Some(object)))
        }
    }
}

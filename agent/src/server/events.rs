//! What happened to objects.

use std::pin::Pin;

use futures::{Stream, StreamExt, TryStreamExt};
use keelson_api::Kind;
use keelson_api::proto::events_server::Events;
use keelson_api::proto::{Event, ListEventsRequest, ListEventsResponse};
use tonic::{Request, Response, Status};

use super::{parse_kind, status};
use crate::Agent;

/// What happened to objects.
#[derive(Debug)]
pub struct EventsService {
    agent: Agent,
}

impl EventsService {
    /// The service of this agent.
    pub fn new(agent: Agent) -> Self {
        Self { agent }
    }
}

#[tonic::async_trait]
impl Events for EventsService {
    async fn list(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let filter = Filter::new(&request.into_inner())?;
        let (events, _) = self.agent.events.list().await.map_err(status)?;
        let events = events
            .iter()
            .filter(|event| filter.matches(event))
            .map(encode);
        Ok(Response::new(ListEventsResponse {
            events: events.collect::<Result<_, _>>()?,
        }))
    }

    type FollowStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let filter = Filter::new(&request.into_inner())?;
        let (events, revision) = self.agent.events.list().await.map_err(status)?;
        let later = self.agent.events.follow(revision).await.map_err(status)?;
        let events = futures::stream::iter(events.into_iter().map(Ok)).chain(later.map_err(status));
        let events = events.try_filter_map(move |event| {
            std::future::ready(filter.matches(&event).then(|| encode(&event)).transpose())
        });
        Ok(Response::new(events.boxed()))
    }
}

struct Filter {
    kind: Option<Kind>,
    name: String,
}

impl Filter {
    fn new(request: &ListEventsRequest) -> Result<Self, Status> {
        let kind = match request.kind.as_str() {
            "" => None,
            kind => Some(parse_kind(kind)?),
        };
        Ok(Self {
            kind,
            name: request.name.clone(),
        })
    }

    fn matches(&self, event: &keelson_api::Event) -> bool {
        self.kind.is_none_or(|kind| kind == event.object.kind)
            && (self.name.is_empty() || self.name == event.object.name)
    }
}

fn encode(event: &keelson_api::Event) -> Result<Event, Status> {
    let json = serde_json::to_vec(event).map_err(|error| Status::internal(error.to_string()))?;
    Ok(Event { json })
}

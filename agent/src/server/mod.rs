//! The agent's gRPC interface on its Unix socket.

mod capture;
mod console;
mod disks;
mod events;
mod host;
mod objects;
mod packets;
mod snapshots;
mod usage;
mod virtual_machines;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use keelson_api::proto::disks_server::DisksServer;
use keelson_api::proto::events_server::EventsServer;
use keelson_api::proto::host_server::HostServer;
use keelson_api::proto::objects_server::ObjectsServer;
use keelson_api::proto::virtual_machines_server::VirtualMachinesServer;
use keelson_api::{ApiError, Kind, Object, proto};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Status};

use crate::objects::Stored;
use crate::{Agent, AgentError, error::Result};

/// The largest request, in bytes: a manifest with its envelope.
const MESSAGE_LIMIT: usize = 2 << 20;

/// Listens on the configured socket and answers until `shutdown` completes.
///
/// # Errors
/// [`AgentError::Io`] where the socket is taken by another agent or can't be bound.
pub async fn serve(agent: Agent, shutdown: impl Future<Output = ()>) -> Result<()> {
    let listener = listen(&agent.config.socket).await?;
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<ObjectsServer<objects::ObjectsService>>()
        .await;
    health
        .set_serving::<VirtualMachinesServer<virtual_machines::VirtualMachinesService>>()
        .await;
    health
        .set_serving::<DisksServer<disks::DisksService>>()
        .await;
    health
        .set_serving::<EventsServer<events::EventsService>>()
        .await;
    health.set_serving::<HostServer<host::HostService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| AgentError::io("describe the interface")(io::Error::other(error)))?;
    let objects = ObjectsServer::new(objects::ObjectsService::new(agent.clone()));
    let guests = virtual_machines::VirtualMachinesService::new(agent.clone());
    tonic::transport::Server::builder()
        .add_service(health_service)
        .add_service(reflection)
        .add_service(objects.max_decoding_message_size(MESSAGE_LIMIT))
        .add_service(VirtualMachinesServer::new(guests))
        .add_service(DisksServer::new(disks::DisksService::new(agent.clone())))
        .add_service(EventsServer::new(events::EventsService::new(agent.clone())))
        .add_service(HostServer::new(host::HostService::new(agent)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await
        .map_err(|error| AgentError::io("serve the gRPC interface")(io::Error::other(error)))
}

/// Binds the socket; one that nobody listens on any more is replaced.
async fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    if UnixStream::connect(path).await.is_ok() {
        let message = "another agent answers there; stop it first, or configure another socket";
        return Err(AgentError::io(what())(io::Error::other(message)));
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(AgentError::io(what()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(AgentError::io(what())(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(AgentError::io(what()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(AgentError::io(what()))?;
    Ok(listener)
}

/// The gRPC status of an error.
#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn status(error: AgentError) -> Status {
    use keelson_controlplane::StateError;
    let code = match &error {
        AgentError::Manifest(_) | AgentError::Invalid(_) => Code::InvalidArgument,
        AgentError::Precondition(_) => Code::FailedPrecondition,
        AgentError::NotFound { .. } => Code::NotFound,
        AgentError::Conflict(_) => Code::Aborted,
        AgentError::State(StateError::Unavailable(_)) => Code::Unavailable,
        AgentError::State(StateError::OutcomeUnknown(_)) => Code::Unknown,
        AgentError::Corrupt { .. } => Code::DataLoss,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}

fn parse_kind(text: &str) -> std::result::Result<Kind, Status> {
    text.parse()
        .map_err(|error: ApiError| Status::invalid_argument(error.to_string()))
}

fn to_proto(object: &Object) -> std::result::Result<proto::Object, Status> {
    let metadata = object.metadata();
    Ok(proto::Object {
        kind: object.kind().to_string(),
        name: metadata.name.clone(),
        resource_version: metadata.resource_version.parse().unwrap_or_default(),
        json: serde_json::to_vec(object).map_err(|error| Status::internal(error.to_string()))?,
    })
}

fn stored_to_proto(stored: &Stored<Object>) -> std::result::Result<proto::Object, Status> {
    to_proto(&stored.object)
}

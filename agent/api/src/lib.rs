//! Keelson's objects, their validation, and the agent's gRPC interface.
//!
//! Objects are shaped as Kubernetes shapes its own: `apiVersion`, `kind`, `metadata`, a `spec`
//! that people write and a `status` that the agent writes. A manifest is one or more of them, as
//! YAML or JSON:
//!
//! ```
//! let documents = keelson_api::manifest::parse(
//!     "apiVersion: keelson.dev/v1alpha1
//! kind: Disk
//! metadata: {name: data}
//! spec: {path: /var/lib/keelson/data.img}
//! ",
//! )?;
//! let object = keelson_api::Object::from_json(&documents[0])?;
//! assert_eq!(object.kind(), keelson_api::Kind::Disk);
//! assert!(object.validate().is_empty());
//! # Ok::<(), keelson_api::ApiError>(())
//! ```

mod cloud_init;
mod device_status;
mod devices;
mod disk;
mod error;
mod event;
mod guest_configuration;
mod host;
pub mod manifest;
mod metadata;
mod migration;
mod network;
mod object;
mod port_forward;
mod rate_limit;
mod resource_limits;
mod rule;
mod security_group;
mod service;
mod units;
mod uplink;
mod virtual_machine;

pub use cloud_init::{CloudInit, CloudInitUser};
pub use device_status::{DeviceKind, DeviceState, DeviceStatus};
pub use devices::{Balloon, Devices, EndAction, PanicDevice, VirtioConsole, Vsock, Watchdog};
pub use disk::{Disk, DiskBase, DiskEncryption, DiskFormat, DiskLimits, DiskSpec, DiskStatus};
pub use error::{ApiError, FieldError};
pub use event::{Event, EventType, ObjectReference};
pub use guest_configuration::{Dns, Route};
pub use host::{Host, HostResources, HostSpec, HostStatus};
pub use metadata::{Condition, ConditionStatus, ObjectMeta, set_condition, validate_name};
pub use migration::{Migration, MigrationLimits, MigrationPhase, MigrationProgress};
pub use network::{Network, NetworkSpec, NetworkStatus, Overlay};
pub use object::{Kind, Object, Resource};
pub use port_forward::{PortForward, PortForwardSpec, PortForwardStatus};
pub use rate_limit::{InterfaceLimits, RateLimit};
pub use resource_limits::{CpuAmount, ResourceLimits};
pub use rule::{IcmpType, PortRange, Protocol};
pub use security_group::{
    EgressRule, IngressRule, RuleParts, SecurityGroup, SecurityGroupSpec, SecurityGroupStatus,
};
pub use service::{
    BackendStatus, Health, HealthCheck, Service, ServicePort, ServiceProtocol, ServiceSpec,
    ServiceStatus,
};
pub use units::{BitRate, MacAddress, MemorySize, TimeLimit};
pub use uplink::{SourceNat, Uplink};
pub use virtual_machine::{
    DiskAttachment, Failover, HugepageSize, Interface, InterfaceStatus, KernelSource, Phase,
    Placement, PlacementState, PowerState, RestartPolicy, VirtualMachine, VirtualMachineSpec,
    VirtualMachineStatus,
};

/// The version of the objects' shapes that this crate knows.
pub const API_VERSION: &str = "keelson.dev/v1alpha1";

/// The gRPC messages, clients and servers generated from `proto/keelson/v1alpha1/agent.proto`.
#[allow(
    missing_docs,
    unused_qualifications,
    clippy::pedantic,
    clippy::unwrap_used
)]
pub mod proto {
    tonic::include_proto!("keelson.v1alpha1");

    /// The encoded `FileDescriptorSet`, for gRPC server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        tonic::include_file_descriptor_set!("keelson_descriptor");
}

//! The wire contract of etcd v3's gRPC API: one module for each protobuf package.

/// Pairs and events.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// Users, roles and permissions.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod authpb {
    tonic::include_proto!("authpb");
}

/// KV, Watch, Lease, Cluster, Maintenance and Auth.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// Locks.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

/// Elections.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

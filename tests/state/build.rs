//! Generates the interface between members, for tests that play one.

fn main() -> std::io::Result<()> {
    let folder = "../../controlplane/server/proto";
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&[format!("{folder}/peer.proto")], &[folder.to_owned()])
}

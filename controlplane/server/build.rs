//! Generates the interface between members.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .bytes(".")
        .compile_protos(&["proto/peer.proto"], &["proto"])
}

//! Generates messages, clients and servers from `proto/`.

fn main() -> std::io::Result<()> {
    let protos = ["rpc.proto", "v3lock.proto", "v3election.proto"];
    tonic_prost_build::configure()
        .bytes(".")
        .compile_protos(&protos, &["proto"])
}

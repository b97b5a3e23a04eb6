//! Generates the gRPC client, server and descriptor set from `proto/`.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = PathBuf::from(std::env::var("OUT_DIR")?).join("keelson_descriptor.bin");
    tonic_prost_build::configure()
        .file_descriptor_set_path(descriptors)
        .compile_protos(&["proto/keelson/v1alpha1/agent.proto"], &["proto"])?;
    Ok(())
}

//! Builds the payload guest, which is linked for a machine without an operating system and therefore a
//! workspace of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let source = manifest.join("../payload");
    let target = Path::new(&variable("OUT_DIR")).join("payload");
    for watched in [
        "src",
        "build.rs",
        "layout.ld",
        "Cargo.toml",
        "Cargo.lock",
        ".cargo",
    ] {
        println!("cargo:rerun-if-changed={}", source.join(watched).display());
    }
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(&target)
        .current_dir(&source);
    // What the outer build was told is for the host's programs.
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(
        status.success(),
        "the payload guest in tests/payload doesn't build"
    );
    let image = target.join("x86_64-unknown-linux-gnu/release/keelson-payload");
    println!("cargo:rustc-env=KEELSON_PAYLOAD={}", image.display());
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

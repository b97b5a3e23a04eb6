//! Compiles `ebpf/programs` for the BPF virtual machine and leaves the object in `OUT_DIR`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "keelson-ebpf-programs";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            println!("cargo::error={problem}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let manifest_dir = path_variable("CARGO_MANIFEST_DIR")?;
    let out_dir = path_variable("OUT_DIR")?;
    let ebpf = manifest_dir
        .parent()
        .ok_or("this crate has no parent folder")?;
    let programs = ebpf.join("programs");
    for input in [
        "programs/src",
        "programs/Cargo.toml",
        "programs/Cargo.lock",
        "common/src",
        "common/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", ebpf.join(input).display());
    }
    for variable in ["BPF_LINKER", "KEELSON_CACHE", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let release = rustc_release(&rustc)?;
    require_rust_src(&rustc, &release)?;
    let linker = find_linker(&release)?;
    println!("cargo::rerun-if-changed={}", linker.display());

    // Not the outer build's target folder, whose lock the outer cargo holds.
    let target_dir = out_dir.join("programs-target");
    compile(&programs, &target_dir, &linker)?;
    let object = target_dir.join(TARGET).join("release").join(OBJECT);
    let copy = out_dir.join("programs.o");
    std::fs::copy(&object, &copy).map(drop).map_err(|error| {
        format!(
            "cannot copy {} to {}: {error}",
            object.display(),
            copy.display()
        )
    })
}

fn compile(programs: &Path, target_dir: &Path, linker: &Path) -> Result<(), String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(programs)
        .args(["build", "--release", "--locked", "--quiet"])
        .args(["--target", TARGET, "-Zbuild-std=core", "--target-dir"])
        .arg(target_dir)
        // -Zbuild-std is what an unstable option is needed for.
        .env("RUSTC_BOOTSTRAP", "1")
        // An incremental build compiles in pieces: that makes other programs, which the verifier may refuse.
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        // BTF, which describes the maps that hold maps.
        .env(
            "CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS",
            "-C link-arg=--btf",
        );
    if let Some(architecture) = env::var_os("CARGO_CFG_TARGET_ARCH") {
        command.env("AYA_BPF_TARGET_ARCH", architecture);
    }
    // Everyone's programs are the same, whatever profile the outer build has.
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("CARGO_PROFILE_") {
            command.env_remove(variable);
        }
    }
    // What was meant for the outer build's target, or wraps its compiler (clippy).
    for variable in [
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "RUSTC",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTFLAGS",
    ] {
        command.env_remove(variable);
    }
    let output = command
        .output()
        .map_err(|error| format!("cannot start cargo for the eBPF programs: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        for line in messages.lines().filter(|line| !line.is_empty()) {
            println!("cargo::warning={line}");
        }
        return Ok(());
    }
    for line in messages.lines() {
        println!("cargo::error={line}");
    }
    Err("the eBPF programs in ebpf/programs did not build; cargo's messages are above".into())
}

fn rustc_release(rustc: &OsString) -> Result<String, String> {
    let version = stdout(rustc, &["-vV"])?;
    version
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .map(str::to_owned)
        .ok_or_else(|| "`rustc -vV` names no release".to_owned())
}

fn require_rust_src(rustc: &OsString, release: &str) -> Result<(), String> {
    let sysroot = stdout(rustc, &["--print", "sysroot"])?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if core.is_file() {
        return Ok(());
    }
    Err(format!(
        "the source of Rust {release} (rust-src), which compiles `core` for eBPF, is missing: \
         run ./setup/ebpf-toolchain"
    ))
}

/// `$BPF_LINKER`, else where setup/ebpf-toolchain puts it, else on the PATH.
fn find_linker(release: &str) -> Result<PathBuf, String> {
    if let Some(linker) = env::var_os("BPF_LINKER") {
        return Ok(linker.into());
    }
    let cache = env::var_os("KEELSON_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache/keelson")));
    let from_setup = cache
        .into_iter()
        .map(|cache| cache.join("ebpf-toolchain").join(release).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    from_setup
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            "bpf-linker, which links the eBPF programs, is missing: run ./setup/ebpf-toolchain"
                .to_owned()
        })
}

fn stdout(program: &OsString, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    String::from_utf8(output.stdout).map_err(|_| format!("{} printed no UTF-8", program.display()))
}

fn path_variable(name: &str) -> Result<PathBuf, String> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("cargo did not set {name}"))
}

//! The main job with the payload guest, on this host's own KVM, in a network of its own: with the
//! state in each store that the agent's configuration may name.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Mounts of its own too: the file system of pins is mounted for the test.
const PREPARE: &str = "mount -t bpf bpf /sys/fs/bpf && ip link set lo up";

#[test]
fn on_the_embedded_store() {
    show(&format!("{PREPARE} && exec \"$0\" show"), Path::new(""));
}

#[test]
fn on_etcd() {
    let cache = std::env::var_os("KEELSON_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/keelson"),
        PathBuf::from,
    );
    show_on("etcd:http://127.0.0.1:2379", &cache.join("etcd/etcd"));
}

#[test]
fn on_a_cluster() {
    let main_job = Path::new(env!("CARGO_BIN_EXE_keelson-main-job"));
    let server = main_job.with_file_name("keelson-state");
    show_on("cluster:http://127.0.0.1:2379", &server);
}

/// With a server that lives as long as the show.
fn show_on(state: &str, server: &Path) {
    let data = tempfile::tempdir().expect("a folder is made");
    let script = format!(
        "{PREPARE} || exit; \"$1\" --data-dir {0}/data >{0}/log 2>&1 </dev/null & server=$!; \
         \"$0\" show --state {state}; code=$?; kill $server; wait $server; exit $code",
        data.path().display()
    );
    show(&script, server);
}

fn show(script: &str, server: &Path) {
    let program = Path::new(env!("CARGO_BIN_EXE_keelson-main-job"));
    assert!(
        program.with_file_name("keelsond").is_file(),
        "build the workspace's programs first"
    );
    let shown = Command::new("unshare")
        .args(["--net", "--mount", "--", "sh", "-c", script])
        .args([program, server])
        .output()
        .expect("unshare runs");
    let text = String::from_utf8_lossy(&shown.stdout);
    println!("{text}");
    assert!(
        shown.status.success(),
        "{}",
        String::from_utf8_lossy(&shown.stderr)
    );
}

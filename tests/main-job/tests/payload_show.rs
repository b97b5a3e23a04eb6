//! The main job with the payload guest, on this host's own KVM, in a network of its own.

use std::path::Path;
use std::process::Command;

#[test]
fn every_line_is_true() {
    let program = Path::new(env!("CARGO_BIN_EXE_keelson-main-job"));
    assert!(
        program.with_file_name("keelsond").is_file(),
        "build the workspace's programs first"
    );
    let shown = Command::new("unshare")
        // Mounts of its own too: the file system of pins is mounted for the test.
        .args(["--net", "--mount", "--"])
        .args([
            "sh",
            "-c",
            "mount -t bpf bpf /sys/fs/bpf && ip link set lo up && exec \"$0\" show",
        ])
        .arg(program)
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

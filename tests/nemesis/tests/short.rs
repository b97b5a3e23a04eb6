//! Short runs against three real members of keelson-state; longer ones are `keelson-nemesis soak`'s.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::process::{Command, Stdio};

/// Clients see nothing that they may not see, whatever is done to the members.
#[test]
fn clients_of_a_broken_cluster_see_what_they_may() {
    let kept = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_keelson-nemesis"))
        .args([
            "run",
            "--program",
            "keelson-state",
            "--seconds",
            "30",
            "--seed",
            "4",
            "--keep",
        ])
        .arg(kept.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

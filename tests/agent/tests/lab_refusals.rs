//! Kernels that forbid what the agent needs, on a lab host: it says so at its start, and what to do.

use std::path::PathBuf;

use keelson_lab::{Exec, ExitStatus, FileCopy, Lab, LabOptions};
use keelson_vmm_tests::binary;

#[test]
fn a_kernel_that_forbids_io_uring_is_refused() {
    let lab = Lab::boot(&LabOptions {
        kernel: "6.12".into(),
        files: ["keelson", "keelsond", "keelson-vmm", "keelson-blk"]
            .map(|program| FileCopy {
                from: binary(program),
                to: PathBuf::from(format!("/usr/bin/{program}")),
            })
            .into(),
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));

    let (code, said) = check(&lab);
    assert_eq!(code, ExitStatus::Code(0), "with io_uring: {said}");

    let forbid = "echo 2 >/proc/sys/kernel/io_uring_disabled";
    assert_eq!(shell(&lab, forbid).0, ExitStatus::Code(0));
    let (code, said) = check(&lab);
    assert_eq!(code, ExitStatus::Code(1), "{said}");
    assert!(said.contains("io_uring is not permitted"), "{said}");
    assert!(said.contains("kernel.io_uring_disabled=0"), "{said}");

    lab.shut_down().expect("the lab shuts down");
}

fn check(lab: &Lab) -> (ExitStatus, String) {
    shell(
        lab,
        "mkdir -p /etc/keelson && : >/etc/keelson/keelsond.toml && keelsond --check 2>&1",
    )
}

fn shell(lab: &Lab, script: &str) -> (ExitStatus, String) {
    let exec = Exec {
        arguments: ["sh", "-c", script].map(String::from).into(),
        timeout_seconds: Some(60),
        ..Exec::default()
    };
    let output = lab.output(&exec, b"").expect("the lab runs a command");
    (output.status, output.text())
}

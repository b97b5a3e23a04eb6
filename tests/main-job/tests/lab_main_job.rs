//! The main job with stock kernels, on lab hosts with the clsact hook (6.1) and with TCX (6.12).

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::path::Path;

use keelson_lab::{Exec, FileCopy, KernelFiles, Lab, LabOptions, guest_initrd};

const PROGRAMS: &[&str] = &["keelson", "keelsond", "keelson-vmm", "keelson-blk"];

/// Emulated KVM under KVM's own emulation takes about 40 s for all of it.
const LIMIT_SECONDS: u64 = 420;

#[test]
fn stock_6_12_on_host_6_12() {
    main_job("6.12", "6.12");
}

#[test]
fn stock_6_1_on_host_6_1() {
    main_job("6.1", "6.1");
}

fn main_job(host: &str, guest: &str) {
    let main_job = Path::new(env!("CARGO_BIN_EXE_keelson-main-job"));
    let kernel = KernelFiles::find(guest).unwrap();
    let mut files = vec![
        copy(main_job, "/usr/bin/keelson-main-job"),
        copy(&kernel.bz_image, "/boot/guest-kernel"),
        copy(
            &guest_initrd::cached(&kernel).unwrap(),
            "/boot/guest-initrd",
        ),
    ];
    for program in PROGRAMS {
        let path = main_job.with_file_name(program);
        assert!(
            path.is_file(),
            "build the workspace's programs first: {}",
            path.display()
        );
        files.push(copy(&path, &format!("/usr/bin/{program}")));
    }
    let lab = Lab::boot(&LabOptions {
        kernel: host.to_owned(),
        files,
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let exec = Exec {
        arguments: [
            "keelson-main-job",
            "show",
            "--kernel",
            "/boot/guest-kernel",
            "--initrd",
            "/boot/guest-initrd",
        ]
        .map(String::from)
        .into(),
        timeout_seconds: Some(LIMIT_SECONDS),
        ..Exec::default()
    };
    let shown = lab
        .output(&exec, b"")
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{}", shown.text());
    assert!(shown.status.success(), "{shown:?}");
    lab.shut_down().unwrap();
}

fn copy(from: &Path, to: &str) -> FileCopy {
    FileCopy {
        from: from.into(),
        to: to.into(),
    }
}

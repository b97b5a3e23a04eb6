//! Stock Debian guests, in the lab: see `src/bin/keelson-stock-guest`.

use std::path::Path;

use keelson_lab::{Exec, FileCopy, KernelFiles, Lab, LabOptions, guest_initrd};

/// KVM under emulation: everything takes its time.
const LIMIT_SECONDS: u64 = 420;

#[test]
fn stock_guests_do_what_they_should() {
    take(&["disk", "clones", "devices", "processors"]);
}

#[test]
#[ignore = "under emulation on a busy machine four vCPUs take longer to boot than a step may; on a quiet one, \
            run it with --run-ignored only"]
fn a_stock_guest_takes_devices_while_it_runs_and_is_cloned_with_them() {
    take(&["hotplug"]);
}

fn take(steps: &[&str]) {
    let program = Path::new(env!("CARGO_BIN_EXE_keelson-stock-guest"));
    let kernel = KernelFiles::find("6.12").expect("the stock kernel is there");
    let initrd = guest_initrd::cached(&kernel).expect("its initramfs can be made");
    let copy = |from: &Path, to: &str| FileCopy {
        from: from.into(),
        to: to.into(),
    };
    let lab = Lab::boot(&LabOptions {
        files: vec![
            copy(program, "/usr/bin/keelson-stock-guest"),
            copy(
                &program.with_file_name("keelson-vmm"),
                "/usr/bin/keelson-vmm",
            ),
            copy(
                &program.with_file_name("keelson-blk"),
                "/usr/bin/keelson-blk",
            ),
            copy(&kernel.bz_image, "/boot/guest-kernel"),
            copy(&initrd, "/boot/guest-initrd"),
        ],
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let exec = Exec {
        arguments: [
            "keelson-stock-guest",
            "/boot/guest-kernel",
            "/boot/guest-initrd",
        ]
        .iter()
        .chain(steps)
        .map(ToString::to_string)
        .collect(),
        timeout_seconds: Some(LIMIT_SECONDS),
        ..Exec::default()
    };
    let shown = lab
        .output(&exec, b"")
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{}", shown.text());
    let errors = String::from_utf8_lossy(&shown.stderr);
    assert!(shown.status.success(), "{errors}");
    assert!(shown.text().ends_with("all passed"), "{errors}");
    lab.shut_down().expect("the lab can be shut down");
}

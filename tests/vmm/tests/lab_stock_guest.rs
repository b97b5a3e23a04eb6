//! Stock Debian guests, in the lab: see `src/bin/keelson-stock-guest`.

use std::fs;
use std::path::Path;

use keelson_lab::{
    Exec, ExitStatus, FileCopy, KernelFiles, Lab, LabOptions, StreamFrame, guest_initrd,
};

/// KVM under emulation: everything takes its time.
const LIMIT_SECONDS: u64 = 420;
/// Bytes of the lab's console that are shown when it fails.
const CONSOLE_SHOWN: usize = 4000;

#[test]
fn stock_guests_do_what_they_should() {
    take(&["disk", "clones", "devices", "processors"]);
}

#[test]
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
    let (shown, status) = follow(&lab, &exec);
    assert!(status.success(), "{status:?}");
    assert!(shown.ends_with("all passed\n"), "{status:?}");
    lab.shut_down().expect("the lab can be shut down");
}

/// Runs a command; shows what it prints as it comes, so that it is to be seen how far it came whatever ends
/// it, and returns what was on its standard output.
fn follow(lab: &Lab, exec: &Exec) -> (String, ExitStatus) {
    let mut running = lab.spawn(exec).expect("the lab starts commands");
    running.input().close().expect("it needs no input");
    let mut shown = String::new();
    loop {
        match running.next_frame() {
            Ok(StreamFrame::Stdout(piece)) => {
                let piece = String::from_utf8_lossy(&piece).into_owned();
                print!("{piece}");
                shown += &piece;
            }
            Ok(StreamFrame::Stderr(piece)) => eprint!("{}", String::from_utf8_lossy(&piece)),
            Ok(StreamFrame::Ended(status)) => return (shown, status),
            Err(error) => {
                let console = fs::read(&lab.state().console).unwrap_or_default();
                let console = String::from_utf8_lossy(&console).into_owned();
                let start = console.len().saturating_sub(CONSOLE_SHOWN);
                let start = console.ceil_char_boundary(start);
                panic!(
                    "{error}; the lab's console ends with: {}",
                    &console[start..]
                );
            }
        }
    }
}

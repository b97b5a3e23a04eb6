//! Three agents on a three-member cluster lose a host, in the lab: Debian's kernel, whose KVM is emulated.

use std::env::current_exe;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_agent_tests::Loss;
use keelson_lab::{Exec, FileCopy, Lab, LabOptions};
use keelson_vmm_tests::{be_patient, binary, payload};
use rustix::time::{ClockId, clock_gettime, clock_settime};

/// Everything takes ten times as long there, the kernel's check of eBPF programs most of all.
const LEASE_SECONDS: u64 = 40;
/// Members that take turns on one processor hear of each other late.
const MEMBER_FLAGS: [&str; 4] = ["--heartbeat-interval", "500", "--election-timeout", "4000"];
const LIMIT_SECONDS: u64 = 840;
const FOLDER: &str = "/opt/keelson";

#[test]
fn three_hosts_lose_one() {
    let test = current_exe().expect("a test knows its own path");
    let copy = |from: &Path, to: PathBuf| FileCopy {
        from: from.into(),
        to,
    };
    // As they stand in the folder that all was built in.
    let own = Path::new(FOLDER).join("deps/lab_fleet");
    let mut files = vec![
        copy(&test, own.clone()),
        copy(payload(), payload().to_owned()),
    ];
    for program in [
        "keelson",
        "keelsond",
        "keelson-vmm",
        "keelson-blk",
        "keelson-state",
    ] {
        files.push(copy(&binary(program), Path::new(FOLDER).join(program)));
    }
    let lab = Lab::boot(&LabOptions {
        files,
        // The check of an eBPF program takes seconds in the kernel, in which others have to answer.
        kernel_arguments: vec!["preempt=full".into()],
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let own = own.to_string_lossy().into_owned();
    let words = ["--exact", "in_the_lab", "--ignored", "--nocapture"];
    let exec = Exec {
        arguments: [own].into_iter().chain(words.map(String::from)).collect(),
        timeout_seconds: Some(LIMIT_SECONDS),
        ..Exec::default()
    };
    let shown = lab
        .output(&exec, b"")
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{}", shown.text());
    let errors = String::from_utf8_lossy(&shown.stderr);
    assert!(shown.status.success(), "{errors}");
    lab.shut_down().expect("the lab shuts down");
}

#[test]
#[ignore = "what three_hosts_lose_one runs in the lab"]
fn in_the_lab() {
    be_patient(Duration::from_mins(4));
    let loss = Loss {
        lease_seconds: LEASE_SECONDS,
        member_flags: &MEMBER_FLAGS,
        shift_clock,
    };
    loss.of_one_of_three();
}

/// The lab is a machine of the test's own.
fn shift_clock(hours: i64) {
    let mut time = clock_gettime(ClockId::Realtime);
    time.tv_sec += hours * 3600;
    clock_settime(ClockId::Realtime, time).expect("root can set the clock");
}

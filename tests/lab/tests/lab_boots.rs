//! The lab starts on each kernel, runs a guest on its KVM, and carries commands and files.

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::path::Path;
use std::time::Duration;

use keelson_lab::{Exec, ExitStatus, FileCopy, Lab, LabError, LabOptions, StreamFrame};

fn boot(kernel: &str) -> Lab {
    let options = LabOptions {
        kernel: kernel.to_owned(),
        memory_mib: 768,
        cpus: 2,
        files: vec![FileCopy {
            from: "/etc/passwd".into(),
            to: "/lab/deep/passwd".into(),
        }],
        ..LabOptions::default()
    };
    Lab::boot(&options).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn kernel_6_12_runs_guests_commands_and_files() {
    let lab = boot("6.12");
    a_guest_runs_on_its_kvm(&lab, "6.12.");
    streams_and_exit_codes_come_through(&lab);
    commands_run_at_the_same_time(&lab);
    a_command_ends_with_its_connection(&lab);
    a_time_limit_ends_a_command(&lab);
    files_come_back_as_they_went(&lab);
    the_host_side_tools_are_there(&lab);
    lab.shut_down().unwrap();
}

#[test]
fn kernel_6_1_runs_guests_and_has_clsact() {
    let lab = boot("6.1");
    a_guest_runs_on_its_kvm(&lab, "6.1.");
    the_host_side_tools_are_there(&lab);
}

fn a_guest_runs_on_its_kvm(lab: &Lab, release: &str) {
    let status = lab.status().unwrap();
    assert!(status.kernel.starts_with(release), "{status:?}");
    let check = lab.run(&["keelson-lab-init", "check-kvm"]).unwrap();
    assert!(check.status.success(), "{check:?}");
    let nested = lab.shell("grep -c svm /proc/cpuinfo").unwrap().text();
    assert_eq!(nested, "2");
}

fn streams_and_exit_codes_come_through(lab: &Lab) {
    let exec = Exec {
        arguments: ["sh", "-c", "cat; echo $WORD >&2; pwd >&2; exit 7"]
            .map(String::from)
            .into(),
        environment: vec![("WORD".into(), "from outside".into())],
        directory: Some("/lab".into()),
        ..Exec::default()
    };
    let output = lab.output(&exec, b"to standard input").unwrap();
    assert_eq!(output.status, ExitStatus::Code(7));
    assert_eq!(output.stdout, b"to standard input");
    assert_eq!(output.stderr, b"from outside\n/lab\n");

    assert_eq!(
        lab.shell("kill -9 $$").unwrap().status,
        ExitStatus::Signal(9)
    );
    let missing = lab.run(&["no-such-program"]).unwrap_err();
    assert!(matches!(missing, LabError::Refused(ref why) if why.contains("no-such-program")));

    let terminal = Exec {
        arguments: ["sh", "-c", "stty size; tty"].map(String::from).into(),
        terminal: Some((33, 99)),
        ..Exec::default()
    };
    let text = lab.output(&terminal, b"").unwrap().text();
    assert!(text.starts_with("33 99\r\n/dev/pts/"), "{text:?}");
}

fn commands_run_at_the_same_time(lab: &Lab) {
    // Each end of the pipe is one command: neither ends without the other.
    assert!(lab.run(&["mkfifo", "/tmp/pipe"]).unwrap().status.success());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| lab.run(&["cat", "/tmp/pipe"]).unwrap());
        lab.shell("echo met > /tmp/pipe").unwrap();
        assert_eq!(reader.join().unwrap().text(), "met");
    });
}

fn a_command_ends_with_its_connection(lab: &Lab) {
    let exec = Exec {
        arguments: ["sh", "-c", "echo $$; exec sleep 1000"]
            .map(String::from)
            .into(),
        ..Exec::default()
    };
    let mut running = lab.spawn(&exec).unwrap();
    let StreamFrame::Stdout(pid) = running.next_frame().unwrap() else {
        panic!("no process id")
    };
    let pid = String::from_utf8(pid).unwrap().trim().to_owned();
    drop(running);
    let gone = format!("while [ -e /proc/{pid} ]; do sleep 0.1; done");
    assert!(lab.shell(&gone).unwrap().status.success());
}

fn a_time_limit_ends_a_command(lab: &Lab) {
    let exec = Exec {
        arguments: ["sleep", "1000"].map(String::from).into(),
        timeout_seconds: Some(1),
        ..Exec::default()
    };
    let error = lab.output(&exec, b"").unwrap_err();
    assert!(
        matches!(error, LabError::CommandTimedOut { seconds: 1, .. }),
        "{error}"
    );
}

fn files_come_back_as_they_went(lab: &Lab) {
    let passwd = lab.run(&["cat", "/lab/deep/passwd"]).unwrap();
    assert_eq!(passwd.stdout, std::fs::read("/etc/passwd").unwrap());

    let folder = tempfile::tempdir().unwrap();
    let (sent, fetched) = (folder.path().join("sent"), folder.path().join("fetched"));
    let content: Vec<u8> = (0..3_000_001_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[2])
        .collect();
    std::fs::write(&sent, &content).unwrap();
    lab.put(&sent, Path::new("/lab/new/folder/file")).unwrap();
    lab.get(Path::new("/lab/new/folder/file"), &fetched)
        .unwrap();
    assert!(std::fs::read(&fetched).unwrap() == content);
    let missing = lab.get(Path::new("/lab/nothing"), &fetched).unwrap_err();
    assert!(missing.to_string().contains("/lab/nothing"), "{missing}");
}

fn the_host_side_tools_are_there(lab: &Lab) {
    let script = "set -e
        ip link add keelson0 type bridge && ip tuntap add ktap0 mode tap
        tc qdisc add dev ktap0 clsact
        truncate -s 64M /tmp/d.img && mkfs.ext4 -q /tmp/d.img && e2fsck -fn /tmp/d.img
        dd if=/dev/zero of=/lab/direct bs=4096 count=4 oflag=direct
        test -d /sys/fs/bpf && mkdir /sys/fs/cgroup/test && test -e /sys/fs/cgroup/test/memory.max";
    let output = lab.shell(script).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_lab_that_cannot_start_says_why() {
    let options = LabOptions {
        kernel_arguments: vec!["rdinit=/nothing".into(), "root=/dev/none".into()],
        boot_timeout: Duration::from_mins(2),
        ..LabOptions::default()
    };
    let error = Lab::boot(&options).unwrap_err();
    let LabError::DiedEarly { tail, .. } = &error else {
        panic!("{error}")
    };
    assert!(tail.contains("Kernel panic"), "{tail}");
}

#[test]
fn bad_options_are_named_before_anything_starts() {
    let error = Lab::boot(&LabOptions {
        memory_mib: 64,
        ..LabOptions::default()
    })
    .unwrap_err();
    assert!(error.to_string().contains("512 MiB"), "{error}");
    let error = Lab::boot(&LabOptions {
        kernel: "5.4".into(),
        ..LabOptions::default()
    })
    .unwrap_err();
    assert!(matches!(error, LabError::KernelMissing { .. }), "{error}");
}

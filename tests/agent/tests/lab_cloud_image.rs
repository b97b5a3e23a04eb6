//! A guest of Debian's cloud packages, as they configure themselves, in the lab: it boots from its disk, and
//! cloud-init makes the user, the key, the name and the network of it that its object says.

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_lab::{Exec, FileCopy, Lab, LabOptions};
use keelson_vmm_tests::binary;
use tempfile::TempDir;

const PROGRAMS: [&str; 4] = ["keelson", "keelsond", "keelson-vmm", "keelson-blk"];
/// Systemd, Python and key generation, emulated.
const BOOT_SECONDS: u64 = 500;
const ADDRESS: &str = "10.72.0.2";

// ./test --run-ignored only -E 'binary(lab_cloud_image)'
#[test]
#[ignore = "it takes four to eight minutes of both processors of a small machine"]
fn a_debian_cloud_guest_becomes_what_its_object_says() {
    let folder = TempDir::new().unwrap();
    let lab = boot(folder.path());
    run(
        &lab,
        "keelsond >/tmp/keelsond.log 2>&1 </dev/null & \
         for i in $(seq 120); do keelson get vm >/dev/null 2>&1 && exit; sleep 1; done; exit 1",
    );
    run(&lab, "keelson apply -f /lab/manifest.yaml");
    // The last thing that cloud-init does of what it is told.
    wait_for_console(&lab, "keelson: cloud-init is done");
    assert_eq!(ssh(&lab, "hostname"), "front");
    assert_eq!(ssh(&lab, "id -un; sudo -n id -un"), "admin\nroot");
    assert_eq!(ssh(&lab, "cloud-init status | head -n 1"), "status: done");
    let addresses = ssh(&lab, "ip -o addr show dev eth0; ip route; ip -6 route");
    for words in [
        "inet 10.72.0.2/24",
        "inet6 fd72::2/64",
        "default via 10.72.0.1",
        "via fd72::1 dev eth0",
    ] {
        assert!(addresses.contains(words), "no {words} in {addresses}");
    }
    assert!(ssh(&lab, "ip -o link show dev eth0").contains("mtu 1400"));
    // The file system has grown into the disk, which is larger than the image.
    let size = ssh(&lab, "df --output=size -m / | tail -n 1");
    let size: u64 = size.trim().parse().unwrap();
    assert!(size > 2500, "the root file system has {size} MiB");
    assert_eq!(ssh(&lab, "systemctl --failed --no-legend"), "");
    run(&lab, "keelson stop web");
    let events = run(&lab, "keelson events web");
    assert!(!events.contains("Killed"), "it did not shut down: {events}");
    lab.shut_down().unwrap();
}

fn boot(folder: &Path) -> Lab {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let image = output(&mut Command::new(root.join("setup/debian-cloud-image")));
    let image = PathBuf::from(image.trim());
    let key = folder.join("key");
    output(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "me@host", "-f"])
            .arg(&key),
    );
    let public = fs::read_to_string(folder.join("key.pub")).unwrap();
    let manifest = folder.join("manifest.yaml");
    fs::write(&manifest, manifests(public.trim())).unwrap();
    let mut files = PROGRAMS
        .map(|program| copy(&binary(program), &format!("/usr/bin/{program}")))
        .to_vec();
    for name in ["disk.img", "kernel", "initrd"] {
        files.push(copy(&image.join(name), &format!("/cloud/{name}")));
    }
    files.push(copy(&manifest, "/lab/manifest.yaml"));
    files.push(copy(&key, "/lab/key"));
    Lab::boot(&LabOptions {
        files,
        tools: vec!["ssh".into()],
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

fn manifests(public_key: &str) -> String {
    format!(
        "apiVersion: keelson.dev/v1alpha1
kind: Network
metadata: {{name: lan}}
spec: {{subnet: 10.72.0.0/24, subnetV6: 'fd72::/64', mtu: 1400}}
---
apiVersion: keelson.dev/v1alpha1
kind: SecurityGroup
metadata: {{name: ssh}}
spec: {{ingress: [{{protocol: tcp, ports: ['22']}}]}}
---
apiVersion: keelson.dev/v1alpha1
kind: Disk
metadata: {{name: root}}
spec: {{path: /cloud/root.img, base: {{path: /cloud/disk.img}}, size: 3Gi}}
---
apiVersion: keelson.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: web}}
spec:
  cpus: 1
  memory: 512Mi
  kernel: {{image: /cloud/kernel, initrd: /cloud/initrd, commandLine: 'root=LABEL=root ro console=ttyS0'}}
  disks: [{{name: root, disk: root}}]
  interfaces: [{{name: eth0, network: lan, address: {ADDRESS}, addressV6: 'fd72::2', securityGroups: [ssh]}}]
  cloudInit:
    hostname: front
    runCommands: [\"echo 'keelson: cloud-init is done' >/dev/ttyS0\"]
    users:
      - {{name: admin, sudo: true, shell: /bin/bash, sshAuthorizedKeys: ['{public_key}']}}
"
    )
}

fn wait_for_console(lab: &Lab, line: &str) {
    let script = format!(
        "for i in $(seq {BOOT_SECONDS}); do grep -qs '^{line}' /var/log/keelson/web/console.log && exit; sleep 1; done; exit 1"
    );
    let exec = Exec {
        arguments: ["sh", "-c", &script].map(String::from).into(),
        timeout_seconds: Some(BOOT_SECONDS + 60),
        ..Exec::default()
    };
    let seen = lab.output(&exec, b"").unwrap();
    assert!(
        seen.status.success(),
        "no {line:?} on its console: {}",
        shell(
            lab,
            "keelson logs web | tail -n 60; tail -n 20 /tmp/keelsond.log"
        )
    );
}

/// What a command prints that the lab's host runs in the guest.
fn ssh(lab: &Lab, command: &str) -> String {
    run(
        lab,
        &format!(
            "ssh -i /lab/key -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             -o LogLevel=ERROR -o ConnectTimeout=60 admin@{ADDRESS} \"{command}\""
        ),
    )
}

fn run(lab: &Lab, script: &str) -> String {
    let output = lab.shell(script).unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    output.text()
}

fn shell(lab: &Lab, script: &str) -> String {
    lab.shell(script).unwrap().text()
}

fn copy(from: &Path, to: &str) -> FileCopy {
    FileCopy {
        from: from.into(),
        to: to.into(),
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

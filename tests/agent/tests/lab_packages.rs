//! The Debian packages on a Debian host with systemd, in the lab: installed, upgraded under a running
//! guest, removed, purged.

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::fs;
use std::path::Path;
use std::process::Command;

use keelson_agent_tests::Guest;
use keelson_lab::{FileCopy, Lab, LabOptions};
use keelson_vmm_tests::{payload, wait_until};
use tempfile::TempDir;

const VERSIONS: [&str; 2] = ["0.1.0-1", "0.1.1-1"];

/// Starts the Debian host's systemd, with the lab's devices and network, below `/host`.
const START: &str = r"
set -e
tar -C /host -xf /lab/debian-root.tar
mount --bind /host /host
for folder in proc sys dev; do mount --rbind /$folder /host/$folder; done
echo 0123456789abcdef0123456789abcdef >/host/etc/machine-id
echo 127.0.0.1 localhost >/host/etc/hosts
mkdir -p /sys/fs/cgroup/lab
echo $$ >/sys/fs/cgroup/lab/cgroup.procs
container=lab /usr/sbin/unshare --pid --fork --mount --cgroup sh -c '
    mount -t proc proc /host/proc
    mount -t tmpfs tmpfs /host/run; mkdir /host/run/lock
    umount /host/sys/fs/cgroup; mount -t cgroup2 cgroup2 /host/sys/fs/cgroup
    exec /usr/sbin/chroot /host /usr/lib/systemd/systemd --system --log-target=console --show-status=0
' >/tmp/systemd.log 2>&1 </dev/null &
";

/// Runs the rest of the command line on the Debian host.
const ON_HOST: &str = r#"#!/bin/sh
for process in /proc/[0-9]*; do
    if [ "$(cat "$process/comm" 2>/dev/null)" = systemd ]; then
        exec /usr/sbin/nsenter -t "${process#/proc/}" -m -p -C -r -w "$@"
    fi
done
echo "there is no systemd" >&2
exit 1
"#;

#[test]
fn packages_install_upgrade_and_go_without_harm_to_guests() {
    let host = Host::boot();
    the_agent(&host);
    host.assert_nothing_left();
    the_state_store(&host);
    host.assert_nothing_left();
    host.lab.shut_down().unwrap();
}

fn the_agent(host: &Host) {
    host.run("dpkg -i /packages/0.1.0-1/keelson_*.deb");
    host.run("systemctl is-enabled keelsond");
    // It returned when the agent was ready.
    host.run("systemctl is-active keelsond");
    host.run("keelson apply -f /packages/guest.yaml");
    host.run("keelson wait vm web --for phase=Running");
    let guest = host.machine();
    assert_ne!(guest, "", "no keelson-vmm runs");

    let agent = host.agent();
    host.run("dpkg -i /packages/0.1.1-1/keelson_*.deb");
    host.run("systemctl is-active keelsond");
    assert_ne!(host.agent(), agent, "the upgrade restarts the agent");
    assert_eq!(host.machine(), guest, "an upgrade");
    host.run("keelson wait vm web --for phase=Running");

    let warning = host.run("dpkg -r keelson 2>&1");
    assert!(warning.contains("these guests are running"), "{warning}");
    assert_eq!(host.machine(), guest, "removing the package");
    host.run("dpkg -i /packages/0.1.1-1/keelson_*.deb");
    host.run("keelson wait vm web --for phase=Running");
    assert_eq!(host.machine(), guest, "installing it again");

    host.run("keelson delete vm web");
    assert_eq!(host.machine(), "");
    let silence = host.run("dpkg -r keelson 2>&1");
    assert!(!silence.contains("these guests"), "{silence}");
    host.run("dpkg -P keelson");
}

fn the_state_store(host: &Host) {
    host.run("dpkg -i /packages/0.1.0-1/keelson-state_*.deb");
    host.run("systemctl is-active keelson-state");
    let health = "wget -q -O - http://127.0.0.1:2379/health";
    let healthy = || {
        let output = host.lab.shell(health).unwrap();
        (output.status.success() && output.text().contains("true")).then_some(())
    };
    wait_until("a member that serves", healthy);
    let user = host.run("systemctl show --property=MainPID --value keelson-state");
    let user = host.run(&format!("stat --format=%U /proc/{}", user.trim()));
    assert_eq!(user.trim(), "keelson-state");
    host.run("dpkg -i /packages/0.1.1-1/keelson-state_*.deb");
    wait_until("the upgraded member", healthy);
    host.run("dpkg -P keelson-state");
}

/// The Debian host, and the lab that it is in.
struct Host {
    lab: Lab,
    _files: TempDir,
}

impl Host {
    fn boot() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let folder = TempDir::new().unwrap();
        for version in VERSIONS {
            let mut build = Command::new(root.join("packaging/build"));
            build.args(["--built", "dev", "--version", version, "--out"]);
            output(build.arg(folder.path().join(version)));
        }
        let guest = Guest::new("web", "hang").image("/packages/payload".as_ref());
        fs::write(folder.path().join("guest.yaml"), guest.manifest()).unwrap();
        let on_host = folder.path().join("on-host");
        fs::write(&on_host, ON_HOST).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&on_host, executable).unwrap();
        let debian = output(&mut Command::new(root.join("setup/debian-root")));
        let copy = |from: &Path, to: &str| FileCopy {
            from: from.into(),
            to: to.into(),
        };
        let options = LabOptions {
            files: vec![
                copy(Path::new(debian.trim()), "/lab/debian-root.tar"),
                copy(&folder.path().join(VERSIONS[0]), "/host/packages/0.1.0-1"),
                copy(&folder.path().join(VERSIONS[1]), "/host/packages/0.1.1-1"),
                copy(
                    &folder.path().join("guest.yaml"),
                    "/host/packages/guest.yaml",
                ),
                copy(payload(), "/host/packages/payload"),
                copy(&on_host, "/usr/bin/on-host"),
            ],
            tools: ["chroot", "nsenter", "unshare"].map(String::from).into(),
            ..LabOptions::default()
        };
        let lab = Lab::boot(&options).unwrap_or_else(|error| panic!("{error}"));
        let host = Self {
            lab,
            _files: folder,
        };
        let started = host.lab.shell(START).unwrap();
        assert!(started.status.success(), "{started:?}");
        wait_until("systemd", || {
            let state = host.lab.shell("on-host systemctl is-system-running");
            let state = state.unwrap().text();
            ["running", "degraded"]
                .contains(&state.trim())
                .then_some(())
        });
        host
    }

    /// What a command on the host, which has to succeed, prints.
    fn run(&self, command: &str) -> String {
        let quoted = command.replace('\'', r"'\''");
        let output = self
            .lab
            .shell(&format!("on-host sh -c '{quoted}'"))
            .unwrap();
        assert!(
            output.status.success(),
            "{command}: {output:?}\n{}",
            self.lab
                .shell("tail -n 50 /tmp/systemd.log; on-host systemctl --failed --no-pager")
                .unwrap()
                .text()
        );
        output.text()
    }

    /// The process id of the guest's keelson-vmm.
    fn machine(&self) -> String {
        let found = self
            .lab
            .shell("ps | awk '/[k]eelson-vmm --config/ {print $1}'");
        found.unwrap().text().trim().to_owned()
    }

    fn agent(&self) -> String {
        self.run("systemctl show --property=MainPID --value keelsond")
    }

    /// No file but the tests' own, no process, interface, scope or pinned object is left.
    fn assert_nothing_left(&self) {
        let files = self.run(
            "find / -xdev -name '*keelson*' -not -path '/packages/*' -not -path '/proc/*' \
             -not -path '/var/log/*' -not -path '/var/lib/dpkg/*'",
        );
        assert_eq!(files, "", "files that a purge left");
        let rest = "ps | grep '[k]eelson-[vbs]\\|[k]eelsond'; ip -o link | grep -v ' lo: \\| lab0: '; \
                    ls -d /sys/fs/bpf/keelson; on-host systemctl list-units --all --no-legend '*keelson*'";
        let rest = self.lab.shell(&format!("({rest}) 2>/dev/null"));
        assert_eq!(rest.unwrap().text(), "", "what a purge left");
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

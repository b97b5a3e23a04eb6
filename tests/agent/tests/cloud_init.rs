//! What guests are told by cloud-init's datasource NoCloud, read by cloud-init itself.

use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;
use std::process::Command;

use fatfs::{FileSystem, FsOptions};
use keelson_agent_tests::{Guest, Host};
use keelson_lab::cache_folder;
use serde_json::Value;

/// The exit code for a manifest that is wrong by itself.
const WRONG: i32 = 4;

const CLOUD_INIT: &str = "cloudInit:
    hostname: front
    nameservers: [10.72.0.1]
    runCommands: [\"echo 'a: b' > /run/done\"]
    users:
      - name: admin
        sudo: true
        groups: [docker]
        passwordHash: $6$salt$hash
        sshAuthorizedKeys: ['ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 \"me\": #1']";
const LAN: &str = "---
apiVersion: keelson.dev/v1alpha1
kind: Network
metadata: {name: lan}
spec: {subnet: 10.72.0.0/24, subnetV6: 'fd72::/64'}
";

/// Runs cloud-init, which `setup/cloud-init` fetches.
fn cloud_init(folder: &Path, arguments: &[&str]) -> String {
    let packages = cache_folder().join("cloud-init/packages");
    assert!(
        packages.is_dir(),
        "there is no cloud-init: run setup/cloud-init"
    );
    let output = Command::new("/usr/bin/python3")
        .env("PYTHONPATH", packages)
        .current_dir(folder)
        .args(["-m", "cloudinit.cmd.main"])
        .args(arguments)
        .output()
        .expect("python3 runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {text}{errors}");
    text + &errors
}

fn read(image: &[u8], name: &str) -> String {
    let image = Cursor::new(image.to_vec());
    let file_system = FileSystem::new(image, FsOptions::new()).expect("a FAT file system");
    let mut content = String::new();
    let mut file = file_system.root_dir().open_file(name).expect(name);
    file.read_to_string(&mut content).expect("text");
    content
}

#[test]
fn cloud_init_understands_what_a_guest_is_told() {
    let host = Host::new();
    let guest = Guest::new("web", "blk-id hang")
        .field(CLOUD_INIT)
        .field("interfaces: [{name: eth0, network: lan}]")
        .manifest();
    host.apply(&format!("{LAN}{guest}")).done();
    // The guest has it, by its serial number.
    host.wait_for_console("web", "serial=cidata");
    let path = host.path("run/vms/web/cidata.img");
    let label = Command::new("blkid")
        .args(["-p", "-o", "export"])
        .arg(&path)
        .output()
        .expect("blkid runs");
    let label = String::from_utf8_lossy(&label.stdout).into_owned();
    for word in ["LABEL=CIDATA", "TYPE=vfat"] {
        assert!(
            label.lines().any(|line| line == word),
            "no {word} in {label}"
        );
    }
    let image = fs::read(&path).expect("the image can be read");
    let folder = host.path("seed");
    fs::create_dir(&folder).expect("a folder can be made");
    for name in ["meta-data", "user-data", "network-config"] {
        fs::write(folder.join(name), read(&image, name)).expect("a file can be written");
    }
    let meta: Value = serde_json::from_str(&read(&image, "meta-data")).expect("JSON");
    assert_eq!(meta["local-hostname"], "front");
    assert_eq!(
        meta["instance-id"],
        host.object("vm", "web")["metadata"]["uid"]
    );
    let said = cloud_init(&folder, &["schema", "--config-file", "user-data"]);
    assert!(said.contains("Valid cloud-config"), "{said}");

    let mac = host.object("vm", "web")["spec"]["interfaces"][0]["mac"].clone();
    let mac = format!("eth0,{}", mac.as_str().unwrap_or_default());
    let convert = ["devel", "net-convert", "-p", "network-config", "-k", "yaml"];
    let into = ["-d", "out", "-D", "debian", "-m", &mac, "-O", "networkd"];
    cloud_init(&folder, &[&convert[..], &into[..]].concat());
    let networkd = folder.join("out/etc/systemd/network/10-cloud-init-eth0.network");
    let networkd = fs::read_to_string(networkd).expect("cloud-init wrote it");
    for line in [
        "Address=10.72.0.2/24",
        "Address=fd72::2/64",
        "Gateway=10.72.0.1",
        "Gateway=fd72::1",
        "DNS=10.72.0.1",
    ] {
        assert!(
            networkd.lines().any(|found| found == line),
            "no {line} in {networkd}"
        );
    }
    // The kernel is told nothing that would go before it.
    let config = fs::read_to_string(host.path("run/vms/web/vmm.json")).expect("it is there");
    assert!(!config.contains("ip=10."), "{config}");
}

#[test]
fn what_cloud_init_would_not_take_is_refused() {
    let host = Host::new();
    let refused = |field: &str, words: &[&str]| {
        let guest = Guest::new("web", "hang").field(&format!("cloudInit: {field}"));
        host.apply(&guest.manifest()).refused(WRONG, words);
    };
    refused("{users: [{name: Root}]}", &["spec.cloudInit.users[0].name"]);
    refused(
        "{users: [{name: a, sshAuthorizedKeys: [nonsense]}]}",
        &["users[0].sshAuthorizedKeys[0]"],
    );
    refused(
        "{users: [{name: a, passwordHash: secret}]}",
        &["users[0].passwordHash", "mkpasswd"],
    );
    refused("{userData: 'echo'}", &["userData", "#cloud-config"]);
    refused("{colour: blue}", &["colour"]);
    let disk = Guest::new("web", "hang")
        .field("cloudInit: {}")
        .field("disks: [{name: cidata, disk: data}]");
    host.apply(&disk.manifest())
        .refused(WRONG, &["spec.disks[0].name", "cloudInit"]);
}

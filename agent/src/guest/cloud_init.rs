//! The disk by which cloud-init in a guest learns what to do: a FAT file system of the label `CIDATA`, as
//! its datasource NoCloud has it (<https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html>).

use std::fs;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use keelson_api::{CloudInit, CloudInitUser, DiskLimits, DiskSpec, VirtualMachine};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::host::GuestPort;
use crate::{AgentError, error::Result};

/// The name of the disk in the guest.
pub const DISK: &str = "cidata";
/// Bytes of the image: room for the largest user data.
const IMAGE_BYTES: usize = 1 << 20;
const LABEL: [u8; 11] = *b"CIDATA     ";

/// The disk whose image is at `path`.
pub fn disk(path: PathBuf) -> DiskSpec {
    DiskSpec {
        path,
        shared: false,
        host: None,
        format: None,
        base: None,
        size: None,
        read_only: true,
        queues: 1,
        limits: DiskLimits::default(),
        encryption: None,
    }
}

/// The files that cloud-init reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// Who the guest is.
    pub meta_data: String,
    /// What is to be done at the first boot.
    pub user_data: String,
    /// The addresses of its interfaces.
    pub network_config: String,
}

impl Seed {
    /// What a guest is to be told, with the addresses of its interfaces.
    pub fn of(guest: &VirtualMachine, cloud_init: &CloudInit, ports: &[GuestPort]) -> Self {
        let name = &guest.metadata.name;
        let meta_data = json!({
            // Another object of the same name is another instance, which boots first once more.
            "instance-id": guest.metadata.uid,
            "local-hostname": cloud_init.hostname.as_ref().unwrap_or(name),
        });
        Self {
            meta_data: text(&meta_data),
            user_data: user_data(cloud_init),
            network_config: text(&network_config(cloud_init, ports)),
        }
    }

    /// Writes the image, readable by root alone: it may hold secrets.
    ///
    /// # Errors
    /// [`AgentError::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let what = || format!("write {}", path.display());
        let image = self.image().map_err(AgentError::io(what()))?;
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let opened = options.write(true).create(true).truncate(true).open(path);
        let mut file = opened.map_err(AgentError::io(what()))?;
        file.write_all(&image).map_err(AgentError::io(what()))
    }

    fn image(&self) -> io::Result<Vec<u8>> {
        let mut image = vec![0; IMAGE_BYTES];
        fatfs::format_volume(
            Cursor::new(&mut image[..]),
            FormatVolumeOptions::new().volume_label(LABEL),
        )?;
        let file_system = FileSystem::new(Cursor::new(&mut image[..]), FsOptions::new())?;
        let files = [
            ("meta-data", &self.meta_data),
            ("user-data", &self.user_data),
            ("network-config", &self.network_config),
        ];
        for (name, content) in files {
            let mut file = file_system.root_dir().create_file(name)?;
            file.write_all(content.as_bytes())?;
        }
        file_system.unmount()?;
        Ok(image)
    }
}

/// JSON, which is YAML as well, and in which no text needs rules of its own.
fn text(value: &Value) -> String {
    format!("{value:#}\n")
}

fn user_data(cloud_init: &CloudInit) -> String {
    if let Some(data) = &cloud_init.user_data {
        return data.clone();
    }
    let mut config = Map::new();
    if !cloud_init.users.is_empty() {
        config.insert("users".into(), cloud_init.users.iter().map(user).collect());
        let passwords = cloud_init
            .users
            .iter()
            .any(|user| user.password_hash.is_some());
        config.insert("ssh_pwauth".into(), passwords.into());
    }
    if !cloud_init.run_commands.is_empty() {
        config.insert("runcmd".into(), json!(cloud_init.run_commands));
    }
    format!("#cloud-config\n{}", text(&config.into()))
}

fn user(user: &CloudInitUser) -> Value {
    let shell = user.shell.as_deref().unwrap_or(Path::new("/bin/bash"));
    let mut entry = json!({
        "name": user.name,
        "shell": shell,
        "lock_passwd": user.password_hash.is_none(),
    });
    if let Some(hash) = &user.password_hash {
        entry["hashed_passwd"] = json!(hash);
    }
    if user.sudo {
        entry["sudo"] = json!("ALL=(ALL) NOPASSWD:ALL");
    }
    if !user.groups.is_empty() {
        entry["groups"] = json!(user.groups);
    }
    if !user.ssh_authorized_keys.is_empty() {
        entry["ssh_authorized_keys"] = json!(user.ssh_authorized_keys);
    }
    entry
}

/// Version 2 of cloud-init's network configuration, as netplan has it. Interfaces are told by their
/// Ethernet addresses and named as in the manifest.
fn network_config(cloud_init: &CloudInit, ports: &[GuestPort]) -> Value {
    let mut ethernets = Map::new();
    for (index, port) in ports.iter().enumerate() {
        let network = &port.network_spec;
        let mut addresses = Vec::new();
        if let (Some(address), Some(subnet)) = (port.address, network.subnet) {
            addresses.push(format!("{address}/{}", subnet.prefix_len()));
        }
        if let (Some(address), Some(subnet)) = (port.address_v6, network.subnet_v6) {
            addresses.push(format!("{address}/{}", subnet.prefix_len()));
        }
        let mut ethernet = json!({
            "match": { "macaddress": port.mac.to_string() },
            "set-name": port.interface,
            "dhcp4": false,
            "dhcp6": false,
            "addresses": addresses,
            "mtu": network.mtu,
        });
        // One way out: the first interface's. Not by routes, of which cloud-init 22.4 makes ::/64 of ::/0.
        if index == 0 && network.default_route {
            if let Some(gateway) = network.gateway().filter(|_| port.address.is_some()) {
                ethernet["gateway4"] = json!(gateway);
            }
            if let Some(gateway) = network.gateway_v6().filter(|_| port.address_v6.is_some()) {
                ethernet["gateway6"] = json!(gateway);
            }
        }
        let servers = match &cloud_init.nameservers[..] {
            [] => &network.dns.servers,
            _ => &cloud_init.nameservers,
        };
        if !servers.is_empty() {
            let search = &network.dns.search_domains;
            ethernet["nameservers"] = json!({ "addresses": servers, "search": search });
        }
        ethernets.insert(port.interface.clone(), ethernet);
    }
    json!({ "version": 2, "ethernets": ethernets })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    fn read(image: &mut [u8], name: &str) -> String {
        let file_system = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        assert_eq!(file_system.volume_label_as_bytes(), b"CIDATA");
        let mut content = String::new();
        let mut file = file_system.root_dir().open_file(name).unwrap();
        file.read_to_string(&mut content).unwrap();
        content
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            meta_data in ".{0,400}",
            user_data in prop_oneof![".{0,4000}", Just("x".repeat(256 << 10))],
            network_config in ".{0,400}",
        ) {
            let seed = Seed { meta_data, user_data, network_config };
            let mut image = seed.image().unwrap();
            prop_assert_eq!(image.len(), IMAGE_BYTES);
            prop_assert_eq!(read(&mut image, "meta-data"), seed.meta_data);
            prop_assert_eq!(read(&mut image, "user-data"), seed.user_data);
            prop_assert_eq!(read(&mut image, "network-config"), seed.network_config);
        }
    }

    #[test]
    fn users_are_as_cloud_config_has_them() {
        let cloud_init: CloudInit = serde_json::from_value(json!({
            "users": [{
                "name": "admin", "sudo": true, "groups": ["docker"],
                "sshAuthorizedKeys": ["ssh-ed25519 AAAAC3 \"quoted\": #me"],
            }],
            "runCommands": ["echo 'a: b' > /run/x"],
        }))
        .unwrap();
        let data = user_data(&cloud_init);
        let config = data.strip_prefix("#cloud-config\n").unwrap();
        let config: Value = serde_saphyr::from_str(config).unwrap();
        assert_eq!(
            config["users"][0]["ssh_authorized_keys"][0],
            "ssh-ed25519 AAAAC3 \"quoted\": #me"
        );
        assert_eq!(config["users"][0]["sudo"], "ALL=(ALL) NOPASSWD:ALL");
        assert_eq!(config["users"][0]["lock_passwd"], true);
        assert_eq!(config["runcmd"][0], "echo 'a: b' > /run/x");
        assert_eq!(config["ssh_pwauth"], false);
    }
}

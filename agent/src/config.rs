//! The daemon's configuration: `/etc/keelson/keelsond.toml`, all of it optional.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use keelson_api::MemorySize;
use serde::Deserialize;

use crate::AgentError;

/// Where the configuration is looked for unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/keelson/keelsond.toml";
/// The agent's gRPC socket unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/keelson/keelsond.sock";

/// Less leaves no time to kill guests in before the lease ends.
const HOST_LEASE_SECONDS: std::ops::RangeInclusive<u64> = 3..=600;

/// The daemon's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The state store's URL: `embedded:PATH`, `etcd:http://HOST:PORT[,…]`.
    pub state: String,
    /// The Unix socket of the gRPC interface; only its owner, root, may connect.
    pub socket: PathBuf,
    /// Sockets and process records of guests. They end with the host's uptime, as guests do.
    pub run_directory: PathBuf,
    /// Consoles and the logs of the guests' processes.
    pub log_directory: PathBuf,
    /// Guests' snapshots.
    pub snapshot_directory: PathBuf,
    /// Where eBPF maps and links are pinned, in a mounted bpffs.
    pub bpf_directory: PathBuf,
    /// The folder of `keelson-vmm` and `keelson-blk`; the daemon's own where not given.
    pub program_directory: Option<PathBuf>,
    /// How eBPF programs are attached.
    pub network_hook: NetworkHook,
    /// Guests' virtual machines run in jails: as users of their own, in namespaces, with nothing but
    /// their own files.
    pub jail: bool,
    /// Where metrics are served over HTTP, in Prometheus' text form; nowhere if not given. They tell
    /// guests' names and traffic to everyone who reaches the address.
    pub metrics_listen: Option<SocketAddr>,
    /// The host's name in the fleet, which no other agent of the state store may have; made of the
    /// kernel's host name where not given.
    pub host_name: Option<String>,
    /// The address by which other hosts reach this one, for networks that span hosts; where not given, the one
    /// by which this host reaches the state store, or else everything.
    pub tunnel_address: Option<IpAddr>,
    /// The UDP port of the tunnels between hosts, the same on all of them.
    pub tunnel_port: u16,
    /// Labels of the `Host` object, by which guests select hosts; those that are applied to the object
    /// itself stay beside them.
    pub host_labels: BTreeMap<String, String>,
    /// How long the host's lease lasts without being renewed, in seconds: 3 to 600. Guests that fail
    /// over are killed after four fifths of it, and started elsewhere when it is over.
    pub host_lease_seconds: u64,
    /// Memory that guests can't have, such as `512Mi`.
    pub host_reserved_memory: MemorySize,
    /// Virtual processors that guests may have for each of the host's.
    pub cpu_overcommit: u32,
    /// The TCP address at which guests come in that move to this host while they run; if not given, the
    /// host takes none.
    pub migration_listen: Option<SocketAddr>,
    /// The address at which other hosts reach it; `migration_listen` where not given.
    pub migration_advertise: Option<SocketAddr>,
    /// The certificate that this host shows when guests move to it and from it, in PEM, for the address of
    /// `migration_advertise`. With it guests move by TLS alone, without it not encrypted.
    pub migration_cert_file: Option<PathBuf>,
    /// Its private key.
    pub migration_key_file: Option<PathBuf>,
    /// Who signs the certificates of the other hosts.
    pub migration_trusted_ca_file: Option<PathBuf>,
}

/// How eBPF programs are attached to a guest's TAP device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkHook {
    /// TCX where the kernel has it, else clsact.
    #[default]
    Auto,
    /// TCX links (Linux 6.6 and later).
    Tcx,
    /// A clsact qdisc with filters.
    Clsact,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state: "embedded:/var/lib/keelson/state".into(),
            socket: DEFAULT_SOCKET.into(),
            run_directory: "/run/keelson".into(),
            log_directory: "/var/log/keelson".into(),
            snapshot_directory: "/var/lib/keelson/snapshots".into(),
            bpf_directory: "/sys/fs/bpf/keelson".into(),
            program_directory: None,
            network_hook: NetworkHook::default(),
            jail: true,
            metrics_listen: None,
            host_name: None,
            tunnel_address: None,
            tunnel_port: 4789,
            host_labels: BTreeMap::new(),
            host_lease_seconds: 10,
            host_reserved_memory: MemorySize::from_mib(512).unwrap_or_else(|| unreachable!()),
            cpu_overcommit: 16,
            migration_listen: None,
            migration_advertise: None,
            migration_cert_file: None,
            migration_key_file: None,
            migration_trusted_ca_file: None,
        }
    }
}

impl Config {
    /// Reads the file at `path`, or at [`DEFAULT_PATH`] if it exists and no path is given.
    ///
    /// # Errors
    /// [`AgentError::Config`] where the file cannot be read or a field is unknown or wrong.
    pub fn load(path: Option<&Path>) -> Result<Self, AgentError> {
        let default = Path::new(DEFAULT_PATH);
        let Some(path) = path.or_else(|| default.exists().then_some(default)) else {
            return Ok(Self::default());
        };
        let error = |message: String| AgentError::Config {
            path: path.into(),
            message,
        };
        let text = std::fs::read_to_string(path).map_err(|source| error(source.to_string()))?;
        let config: Self = toml::from_str(&text).map_err(|source| error(source.to_string()))?;
        config.check().map_err(error)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !HOST_LEASE_SECONDS.contains(&self.host_lease_seconds) {
            return Err(format!(
                "host_lease_seconds is {}; give 3 to 600",
                self.host_lease_seconds
            ));
        }
        if let Some(address) = self.tunnel_address {
            crate::host::refuse_tunnel_address(address).map_or(Ok(()), |problem| {
                Err(format!("tunnel_address is {problem}"))
            })?;
        }
        if self.tunnel_port == 0 {
            return Err("tunnel_port is 0; give a UDP port, such as 4789".into());
        }
        if self.cpu_overcommit == 0 {
            return Err("cpu_overcommit is 0; give 1 or more".into());
        }
        let files = [
            &self.migration_cert_file,
            &self.migration_key_file,
            &self.migration_trusted_ca_file,
        ];
        if files
            .iter()
            .any(|file| file.is_some() != files[0].is_some())
        {
            return Err(
                "migration_cert_file, migration_key_file and migration_trusted_ca_file are only of use together"
                    .into(),
            );
        }
        if let Some(address) = self.migration_address()
            && (address.ip().is_unspecified() || address.port() == 0)
        {
            return Err(format!(
                "other hosts can't reach {address}; give migration_advertise, with an address and a port"
            ));
        }
        Ok(())
    }

    /// Where other hosts send guests that move here, if this one takes any.
    pub fn migration_address(&self) -> Option<SocketAddr> {
        let listen = self.migration_listen?;
        Some(self.migration_advertise.unwrap_or(listen))
    }

    /// The folder of `keelson-vmm` and `keelson-blk`.
    ///
    /// # Errors
    /// [`AgentError::Io`] where neither is configured nor the daemon's own path is known.
    pub fn programs(&self) -> Result<PathBuf, AgentError> {
        if let Some(directory) = &self.program_directory {
            return Ok(directory.clone());
        }
        let own = std::env::current_exe().map_err(|source| AgentError::Io {
            what: "find the daemon's own program file".into(),
            source,
        })?;
        Ok(own.parent().map(Path::to_path_buf).unwrap_or_default())
    }
}

//! Ourselves: the eBPF network at the guests' devices.

use std::path::PathBuf;
use std::time::Duration;

use keelson_ebpf::{
    Datapath, DatapathConfig, Direction, InterfacePolicy, IpPrefix, MacAddress, Protocol, RunCost,
    Service, ServiceBackend,
};

use super::frames::End;
use super::hosts::{CLIENT, PORT, Rule, SERVER, SERVICE};

const NETWORK: u32 = 1;

/// The eBPF programs, loaded once for a run: the verifier takes longer than a measurement. Dropping it removes
/// them.
pub struct Keelson {
    datapath: Datapath,
}

impl Keelson {
    /// Loads the programs.
    pub fn open() -> anyhow::Result<Self> {
        let _ = std::fs::remove_dir_all(pin_root());
        let datapath = Datapath::open(&DatapathConfig {
            pin_root: pin_root(),
            ..DatapathConfig::default()
        })?;
        Ok(Self { datapath })
    }

    /// Puts the rules in force at the devices of the calling thread's namespace, with a service in front of
    /// the server.
    pub fn attach(&mut self, rules: &[Rule]) -> anyhow::Result<()> {
        let everything = keelson_ebpf::Rule {
            protocol: Protocol::Any,
            ports: keelson_ebpf::Rule::ALL_PORTS,
            peer: IpPrefix::ANY_IPV4,
            counter: 0,
        };
        let mut ingress: Vec<_> = rules.iter().copied().map(rule).collect();
        if ingress.is_empty() {
            ingress.push(everything.clone());
        }
        self.datapath
            .attach(&policy("hc", CLIENT, vec![everything]))?;
        self.datapath.attach(&policy("hs", SERVER, ingress))?;
        self.datapath.set_services(&[Service {
            network: NETWORK,
            address: SERVICE.address.into(),
            protocol: Protocol::Udp,
            port: PORT,
            backends: vec![ServiceBackend {
                address: SERVER.address.into(),
                port: PORT,
                mac: MacAddress(SERVER.mac),
            }],
            draining: Vec::new(),
        }])?;
        Ok(())
    }

    /// Takes them away from the devices of the calling thread's namespace.
    pub fn detach(&mut self) -> anyhow::Result<()> {
        for device in ["hc", "hs"] {
            self.datapath.detach(device)?;
        }
        Ok(())
    }

    /// What the kernel has counted for the program of a direction.
    pub fn run_cost(&mut self, direction: Direction) -> anyhow::Result<RunCost> {
        Ok(self.datapath.run_cost(direction)?)
    }

    /// What one of `runs` runs of a direction's program on a frame takes, at the device of the calling thread's
    /// namespace.
    pub fn time_frame(
        &mut self,
        device: &str,
        direction: Direction,
        frame: &[u8],
        runs: u32,
    ) -> anyhow::Result<Duration> {
        Ok(self.datapath.time_frame(device, direction, frame, runs)?)
    }
}

impl Drop for Keelson {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(pin_root());
    }
}

fn pin_root() -> PathBuf {
    format!("/sys/fs/bpf/keelson-perf-{}", std::process::id()).into()
}

fn rule(rule: Rule) -> keelson_ebpf::Rule {
    keelson_ebpf::Rule {
        protocol: rule.protocol,
        ports: rule.port..=rule.port,
        peer: IpPrefix::from(std::net::IpAddr::from(rule.peer)),
        counter: 0,
    }
}

fn policy(name: &str, end: End, ingress: Vec<keelson_ebpf::Rule>) -> InterfacePolicy {
    InterfacePolicy {
        name: name.into(),
        mac: MacAddress(end.mac),
        ipv4: Some(end.address),
        network: NETWORK,
        ingress,
        ..InterfacePolicy::default()
    }
}

//! A guest's disks and interfaces, by name, as they come and go.

use std::fmt;

use keelson_api::{DeviceKind, DeviceState, DeviceStatus};
use serde::{Deserialize, Serialize};

use super::cloud_init;
use super::plan::{Hardware, Plan, RunningPlan};

/// A disk or an interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Device {
    /// The disk of this name.
    Disk(String),
    /// The interface of this name.
    Interface(String),
}

impl Device {
    /// What keelson-vmm knows it by.
    pub fn id(&self) -> String {
        match self {
            Self::Disk(name) => format!("disk-{name}"),
            Self::Interface(name) => format!("net-{name}"),
        }
    }

    /// As a status has it.
    pub fn status(&self, state: DeviceState) -> DeviceStatus {
        let (kind, name) = match self {
            Self::Disk(name) => (DeviceKind::Disk, name),
            Self::Interface(name) => (DeviceKind::Interface, name),
        };
        DeviceStatus {
            kind,
            name: name.clone(),
            state,
            reason: None,
            message: None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(name) => write!(formatter, "disk {name}"),
            Self::Interface(name) => write!(formatter, "interface {name}"),
        }
    }
}

impl Hardware {
    /// The devices that can come and go: all but what cloud-init reads at a start.
    pub fn devices(&self) -> impl Iterator<Item = Device> {
        let disks = self.disks.iter().map(|(name, _)| name);
        let disks = disks.filter(|name| *name != cloud_init::DISK).cloned();
        let interfaces = self.interfaces.iter().map(|(name, ..)| name.clone());
        disks
            .map(Device::Disk)
            .chain(interfaces.map(Device::Interface))
    }

    /// Whether it has this device.
    pub fn has(&self, device: &Device) -> bool {
        match device {
            Device::Disk(name) => self.disks.iter().any(|(disk, _)| disk == name),
            Device::Interface(name) => self.interfaces.iter().any(|(port, ..)| port == name),
        }
    }

    fn remove(&mut self, device: &Device) {
        match device {
            Device::Disk(name) => self.disks.retain(|(disk, _)| disk != name),
            Device::Interface(name) => self.interfaces.retain(|(port, ..)| port != name),
        }
    }

    /// Takes a device over from `planned`, at the place that it has there among the others.
    fn insert(&mut self, device: &Device, planned: &Self) {
        self.remove(device);
        match device {
            Device::Disk(name) => {
                let disk = planned.disks.iter().find(|(disk, _)| disk == name);
                self.disks.extend(disk.cloned());
                let place = |name: &str| planned.disks.iter().position(|(disk, _)| disk == name);
                self.disks
                    .sort_by_key(|(disk, _)| place(disk).unwrap_or(usize::MAX));
            }
            Device::Interface(name) => {
                let port = planned.interfaces.iter().find(|(port, ..)| port == name);
                self.interfaces.extend(port.cloned());
                let ports = &planned.interfaces;
                let place = |name: &str| ports.iter().position(|(port, ..)| port == name);
                self.interfaces
                    .sort_by_key(|(port, ..)| place(port).unwrap_or(usize::MAX));
            }
        }
    }

    /// Leaves out devices, and what only the kernel and cloud-init are told at a start about interfaces.
    fn without(&self, left_out: impl Fn(&Device) -> bool, addresses_too: bool) -> Self {
        let mut hardware = self.clone();
        for device in self.devices().filter(left_out) {
            hardware.remove(&device);
        }
        if addresses_too {
            let line = &mut hardware.kernel.command_line;
            *line = super::plan::without_ip_option(line);
            if let Some(seed) = &mut hardware.seed {
                seed.network_config.clear();
            }
        }
        hardware
    }
}

impl RunningPlan {
    /// The devices by which the guest differs from a plan, and those that are on their way.
    pub fn device_changes(&self, plan: &Plan) -> Vec<Device> {
        let (running, planned) = (&self.hardware, &plan.hardware);
        let gone = running.devices().filter(|device| !planned.has(device));
        let new = planned.devices().filter(|device| !running.has(device));
        let mut changes: Vec<_> = gone.chain(new).collect();
        changes.extend(self.adding.iter().chain(&self.removing).cloned());
        // What is gone makes room for what is new, a name of its own included.
        changes.sort_by_key(|device| (planned.has(device), device.clone()));
        changes.dedup();
        changes
    }

    /// From now on there is something of a device on this host; the guest may have it.
    pub fn begin_adding(&mut self, device: &Device, planned: &Hardware) {
        self.hardware.insert(device, planned);
        self.removing.remove(device);
        self.adding.insert(device.clone());
        self.note_interfaces(device);
    }

    /// From now on the guest is to let go of a device.
    pub fn begin_removing(&mut self, device: &Device) {
        self.adding.remove(device);
        self.removing.insert(device.clone());
        self.note_interfaces(device);
    }

    /// The guest has a device, and is to have it.
    pub fn settle(&mut self, device: &Device) {
        self.adding.remove(device);
        self.removing.remove(device);
    }

    /// Nothing of a device is left.
    pub fn forget(&mut self, device: &Device) {
        self.settle(device);
        self.hardware.remove(device);
    }

    /// Whether the guest has to be started anew to be as planned: devices come and go without.
    pub fn needs_restart(&self, planned: &Hardware) -> bool {
        let running = &self.hardware;
        let moves = |device: &Device| {
            let on_its_way = self.adding.contains(device) || self.removing.contains(device);
            on_its_way || !running.has(device) || !planned.has(device)
        };
        let mut all = running.devices().chain(planned.devices());
        let interfaces = self.interfaces_changed
            || all.any(|device| matches!(device, Device::Interface(_)) && moves(&device));
        planned.without(moves, interfaces) != running.without(moves, interfaces)
    }

    fn note_interfaces(&mut self, device: &Device) {
        self.interfaces_changed |= matches!(device, Device::Interface(_));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hardware(disks: &[&str], interfaces: &[&str], command_line: &str) -> Hardware {
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| json!([disk, {"path": format!("/{disk}")}]))
            .collect();
        let interfaces: Vec<_> = interfaces
            .iter()
            .map(|name| json!([name, "lan", "02:00:00:00:00:01", 1500]))
            .collect();
        let hardware = json!({
            "cpus": 1, "memory": "64Mi", "hugepages": null, "disks": disks, "interfaces": interfaces,
            "kernel": {"image": "/kernel", "commandLine": command_line},
        });
        serde_json::from_value(hardware).expect("hardware")
    }

    fn plan(hardware: Hardware) -> Plan {
        Plan {
            name: "web".into(),
            generation: 1,
            hardware,
            ports: Vec::new(),
            limits: keelson_api::ResourceLimits::default(),
        }
    }

    fn ip(name: &str) -> String {
        format!("quiet ip=10.0.0.2::10.0.0.1:255.255.255.0:{name}:eth0:off")
    }

    #[test]
    fn devices_come_in_their_order_and_want_no_restart() {
        let before = plan(hardware(&["a", "c"], &[], "quiet"));
        let after = plan(hardware(&["a", "b", "c"], &["eth0"], &ip("web")));
        let mut running = RunningPlan::begin(&before, 0);
        let b = Device::Disk("b".into());
        let eth0 = Device::Interface("eth0".into());
        let changes = [b, eth0];
        assert_eq!(running.device_changes(&after), changes);
        assert!(!running.needs_restart(&after.hardware));
        for device in &changes {
            running.begin_adding(device, &after.hardware);
            assert_eq!(running.device_changes(&after).first(), Some(device));
            running.settle(device);
            assert!(!running.needs_restart(&after.hardware));
        }
        assert_eq!(running.device_changes(&after), []);
        assert_eq!(running.hardware.disks, after.hardware.disks);
        assert_eq!(running.device_changes(&before), changes);
        running.begin_removing(&changes[0]);
        running.forget(&changes[0]);
        assert_eq!(running.device_changes(&before), changes[1..]);
    }

    #[test]
    fn what_a_guest_keeps_wants_a_restart() {
        let running = RunningPlan::begin(&plan(hardware(&["a"], &["eth0"], &ip("web"))), 0);
        let planned = running.hardware.clone();
        assert!(!running.needs_restart(&planned));
        assert!(running.needs_restart(&hardware(&["a"], &["eth0"], &ip("db"))));
        assert!(running.needs_restart(&hardware(&[], &["eth0"], "loud")));
        let mut other = planned.clone();
        other.disks[0].1.path = "/other".into();
        assert!(running.needs_restart(&other));
        let mut other = planned;
        other.cpus = 2;
        assert!(running.needs_restart(&other));
    }
}

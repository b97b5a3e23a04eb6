//! Metrics of the host and of what its guests use.

use keelson_api::{Kind, Object};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, IntGauge, IntGaugeVec, Opts};

use crate::Agent;
use crate::guest::usage;
use crate::host::Usage;
use crate::objects::World;

/// Metrics of the host and of what its guests use.
pub(super) struct HostFamilies {
    guests: IntGaugeVec,
    restarts: IntGaugeVec,
    cpu: CounterVec,
    memory: IntGaugeVec,
    lease: GaugeVec,
    scheduler: IntGauge,
    resources: GaugeVec,
}

impl HostFamilies {
    pub(super) fn new() -> prometheus::Result<Self> {
        let options = |name: &str, help: &str| Opts::new(format!("keelson_{name}"), help);
        let gauge =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(options(name, help), labels);
        let number =
            |name: &str, help: &str, labels: &[&str]| GaugeVec::new(options(name, help), labels);
        let counter =
            |name: &str, help: &str, labels: &[&str]| CounterVec::new(options(name, help), labels);
        let program = ["guest", "program"];
        Ok(Self {
            guests: gauge("guests", "Guests of this host.", &["phase"])?,
            restarts: gauge(
                "guest_restarts",
                "How often a guest of this host was started after it ended by itself.",
                &["guest"],
            )?,
            cpu: counter(
                "guest_cpu_seconds_total",
                "Processor time of a guest's machine and of its disks' backends.",
                &program,
            )?,
            memory: gauge(
                "guest_resident_memory_bytes",
                "Memory of a guest's machine and of its disks' backends; shared pages count for each.",
                &program,
            )?,
            lease: number(
                "host_lease_remaining_seconds",
                "How long this host can count on its lease without renewing it.",
                &["host"],
            )?,
            scheduler: IntGauge::with_opts(options(
                "scheduler",
                "Whether this agent places the fleet's guests.",
            ))?,
            resources: number(
                "host_resource",
                "What the host has, what guests may have of it, and what guests on it are promised.",
                &["resource", "kind"],
            )?,
        })
    }

    pub(super) async fn set(&self, agent: &Agent, world: &World) {
        self.set_guests(agent, world);
        let reading = agent.clone();
        // A page without them says that they could not be read.
        let used = tokio::task::spawn_blocking(move || usage(&reading)).await;
        for (guest, used) in used.unwrap_or_default() {
            let programs = [("keelson-vmm", used.machine), ("keelson-blk", used.disks)];
            for (program, used) in programs {
                self.set_usage(&guest, program, &used);
            }
        }
        if let Some(left) = agent.fleet.lease_left() {
            let host = [agent.fleet.host()];
            self.lease.with_label_values(&host).set(left.as_secs_f64());
        }
        self.scheduler.set(agent.fleet.is_scheduler().into());
    }

    fn set_guests(&self, agent: &Agent, world: &World) {
        let (mut cpus, mut memory) = (0.0, 0.0);
        for stored in world.of_kind(Kind::VirtualMachine) {
            let Object::VirtualMachine(guest) = &stored.object else {
                continue;
            };
            if !agent.fleet.is_here(guest) {
                continue;
            }
            let phase = guest.status.phase.to_string();
            self.guests.with_label_values(&[&phase]).inc();
            let name = [guest.metadata.name.as_str()];
            let restarts = guest.status.restarts.into();
            self.restarts.with_label_values(&name).set(restarts);
            cpus += f64::from(guest.spec.cpus);
            memory += in_bytes(guest.spec.memory);
        }
        let status = agent.inventory.status(&agent.config);
        let kinds = [
            ("capacity", status.capacity),
            ("allocatable", status.allocatable),
        ];
        for (kind, has) in kinds {
            if let Some(has) = has {
                let set = |resource: &str, value: f64| {
                    self.resources
                        .with_label_values(&[resource, kind])
                        .set(value);
                };
                set("cpus", f64::from(has.cpus));
                set("memory_bytes", in_bytes(has.memory));
                set("disk_bytes", in_bytes(has.disk));
            }
        }
        let promised = |resource: &str| self.resources.with_label_values(&[resource, "promised"]);
        promised("cpus").set(cpus);
        promised("memory_bytes").set(memory);
    }

    fn set_usage(&self, guest: &str, program: &str, used: &Usage) {
        let labels = [guest, program];
        let cpu = self.cpu.with_label_values(&labels);
        cpu.inc_by(used.cpu.as_secs_f64());
        let memory = i64::try_from(used.memory_bytes).unwrap_or(i64::MAX);
        self.memory.with_label_values(&labels).set(memory);
    }

    pub(super) fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.guests.collect();
        families.extend(self.restarts.collect());
        families.extend(self.cpu.collect());
        families.extend(self.memory.collect());
        families.extend(self.lease.collect());
        families.extend(self.scheduler.collect());
        families.extend(self.resources.collect());
        families
    }
}

fn in_bytes(size: keelson_api::MemorySize) -> f64 {
    rounded(size.bytes())
}

/// Prometheus counts in floating point: exact up to 2^53.
#[allow(clippy::cast_precision_loss)]
fn rounded(number: u64) -> f64 {
    number as f64
}

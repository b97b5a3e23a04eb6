//! What the API asks of a guest.

use std::sync::Arc;

use super::life::Guest;
use super::migration::Run;
use crate::api::{
    Acknowledged, AfterSnapshot, BalloonAnswer, GuestState, Reply, SnapshotKind, SnapshotRequest,
    SnapshotTaken,
};
use crate::config::BalloonConfig;
use crate::machine::{Kind, Machine, Order};
use crate::memory::PAGE;
use crate::virtio::console::ConsoleSize;

impl Guest<'_> {
    pub(super) fn balloon(&self, machine: &Machine, paused: bool, reply: Reply) {
        if self.config.balloon.is_none() {
            return reply.refuse("no_balloon", "the guest has no balloon");
        }
        let status = machine.balloon(paused);
        let bytes = |pages| u64::from(pages) * PAGE;
        let (statistics, age) = status.statistics.unzip();
        reply.send(Ok(serde_json::json!(BalloonAnswer {
            wanted_bytes: bytes(status.wanted_pages),
            actual_bytes: bytes(status.actual_pages),
            reported_bytes: status.reported_bytes,
            statistics,
            statistics_age_ms: age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        })));
    }

    pub(super) fn resize_balloon(&self, size_mib: u64, reply: Reply) {
        if self.config.balloon.is_none() {
            return reply.refuse("no_balloon", "the guest has no balloon");
        }
        let memory_mib = self.config.memory.size_mib;
        if let Err(e) = BalloonConfig::check_size("size_mib", size_mib, memory_mib) {
            return reply.refuse("out_of_range", e.to_string());
        }
        self.host.balloon.resize(BalloonConfig::pages(size_mib));
        acknowledge(reply);
    }

    /// What is typed goes to this machine's console.
    pub(super) fn attach_console(&self, machine: &Machine) {
        self.api.attach(match &self.host.virtio_console {
            Some(port) => Box::new(Arc::clone(port)),
            None => Box::new(machine.serial()),
        });
    }

    pub(super) fn resize_console(&self, size: ConsoleSize, reply: Reply) {
        let Some(port) = &self.host.virtio_console else {
            return reply.refuse(
                "no_console_size",
                "the guest's console is its serial port, which has no size",
            );
        };
        port.resize(size);
        acknowledge(reply);
    }

    pub(super) fn press_power_button(&self, machine: &Machine) {
        match machine.press_power_button() {
            Ok(()) => self.shared.set_state(GuestState::Stopping),
            Err(e) => tracing::warn!("can't press the power button: {e}"),
        }
    }

    pub(super) fn pause(&self, machine: &Machine, run: &mut Run, reply: Reply) {
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        if !run.paused
            && let Err(e) = machine.pause()
        {
            return reply.refuse("pause_failed", e.to_string());
        }
        run.paused = true;
        self.shared.set_state(GuestState::Paused);
        acknowledge(reply);
    }

    pub(super) fn resume(&self, machine: &Machine, run: &mut Run, reply: Reply) {
        if self.take_back(machine, run) {
            return acknowledge(reply);
        }
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        if !run.paused {
            return reply.refuse("not_paused", "the guest is not paused");
        }
        machine.resume();
        run.go_on();
        self.shared.resumed();
        acknowledge(reply);
    }

    pub(super) fn snapshot(
        &self,
        machine: &mut Machine,
        run: &mut Run,
        request: &SnapshotRequest,
        reply: Reply,
    ) {
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        let order = Order {
            directory: &request.directory,
            kind: match request.kind {
                SnapshotKind::Full => Kind::Full,
                SnapshotKind::Differential => Kind::Differential,
            },
            paused: run.paused,
            resume: request.then == AfterSnapshot::Resume,
        };
        match machine.snapshot(&self.config, &order) {
            Ok(taken) => {
                if !order.resume && !run.paused {
                    run.paused = true;
                    self.shared.set_state(GuestState::Paused);
                }
                tracing::info!(
                    directory = %request.directory.display(),
                    memory_bytes = taken.memory_bytes,
                    paused_us = micros(taken.paused),
                    "took a snapshot"
                );
                reply.send(Ok(serde_json::json!(SnapshotTaken {
                    memory_bytes: taken.memory_bytes,
                    paused_us: micros(taken.paused),
                })));
            }
            Err(e) => {
                tracing::warn!("the snapshot failed: {e}");
                reply.refuse("snapshot_failed", e.to_string());
            }
        }
    }
}

pub(super) fn acknowledge(reply: Reply) {
    reply.send(Ok(serde_json::json!(Acknowledged {})));
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

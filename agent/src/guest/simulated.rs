//! Guests that take a given time to start and do nothing: what an agent does around them is real.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::exit::GuestExit;
use super::layer::{GuestLayer, GuestRuntime};
use super::plan::{Plan, RunningPlan};
use super::runtime::Problem;
use crate::config::Config;
use crate::fleet::LeaseCheck;
use crate::{Agent, error::Result};

/// The simulated guests of one host. They outlive its agent, as processes do; they use no disks and no
/// devices, and nothing ends them but their agent.
#[derive(Clone, Debug)]
pub struct SimulatedGuests {
    start_time: Duration,
    guests: Arc<Mutex<BTreeMap<String, RunningPlan>>>,
}

impl SimulatedGuests {
    /// A host without guests, where each takes `start_time` to start.
    pub fn new(start_time: Duration) -> Self {
        Self {
            start_time,
            guests: Arc::default(),
        }
    }

    /// How many run.
    pub fn count(&self) -> usize {
        self.guests.lock().len()
    }

    /// Ends all of them, as a host that crashes does.
    pub fn crash(&self) {
        self.guests.lock().clear();
    }
}

impl GuestLayer for SimulatedGuests {
    fn guest(&self, _agent: &Agent, name: &str) -> Box<dyn GuestRuntime> {
        Box::new(SimulatedRuntime {
            name: name.into(),
            host: self.clone(),
            running: None,
            lease: None,
            end: Notify::new(),
        })
    }

    fn known_guests(&self, _config: &Config) -> Vec<String> {
        self.guests.lock().keys().cloned().collect()
    }
}

#[derive(Debug)]
struct SimulatedRuntime {
    name: String,
    host: SimulatedGuests,
    running: Option<RunningPlan>,
    lease: Option<LeaseCheck>,
    end: Notify,
}

impl SimulatedRuntime {
    fn runs(&self) -> bool {
        self.host.guests.lock().contains_key(&self.name)
    }
}

#[async_trait]
impl GuestRuntime for SimulatedRuntime {
    async fn adopt(&mut self) -> Result<bool> {
        self.running = self.host.guests.lock().get(&self.name).cloned();
        Ok(self.running.is_some())
    }

    async fn start(&mut self, plan: &Plan, restarts: u32, lease: Option<LeaseCheck>) -> Result<()> {
        tokio::time::sleep(self.host.start_time).await;
        let running = RunningPlan::begin(plan, restarts);
        self.running = Some(running.clone());
        self.lease = lease;
        self.host.guests.lock().insert(self.name.clone(), running);
        Ok(())
    }

    /// Takes and lets go of devices at once.
    async fn maintain(&mut self, plan: &Plan) -> Result<Option<Problem>> {
        if let Some(running) = &mut self.running {
            for device in running.device_changes(plan) {
                running.forget(&device);
                if plan.hardware.has(&device) {
                    running.begin_adding(&device, &plan.hardware);
                    running.settle(&device);
                }
            }
            if let Some(known) = self.host.guests.lock().get_mut(&self.name) {
                known.clone_from(running);
            }
        }
        Ok(None)
    }

    async fn has_changed(&self, _was_paused: bool) -> bool {
        !self.may_run() || !self.runs()
    }

    async fn take_exit(&mut self) -> Option<GuestExit> {
        if self.running.is_none() || self.runs() {
            return None;
        }
        self.running = None;
        Some(GuestExit {
            clean: true,
            reason: "GuestShutDown",
            message: "the simulated guest ended".into(),
        })
    }

    async fn something_ended(&self) {
        self.end.notified().await;
    }

    async fn press_power_button(&self) -> Result<()> {
        self.kill().await;
        Ok(())
    }

    async fn kill(&self) {
        if self.host.guests.lock().remove(&self.name).is_some() {
            self.end.notify_one();
        }
    }

    async fn tear_down(&mut self, _interfaces: &[String]) -> Result<()> {
        self.kill().await;
        self.running = None;
        self.lease = None;
        Ok(())
    }

    fn remove_kept(&self) -> Result<()> {
        Ok(())
    }

    async fn is_paused(&self) -> bool {
        false
    }

    fn is_running(&self) -> bool {
        self.running.is_some()
    }

    fn process_id(&self) -> Option<u32> {
        None
    }

    fn running(&self) -> Option<&RunningPlan> {
        self.running.as_ref()
    }

    fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    fn may_run(&self) -> bool {
        self.lease.as_ref().is_none_or(LeaseCheck::holds)
    }

    fn put_on_lease(&mut self, lease: LeaseCheck) -> Result<()> {
        self.lease = Some(lease);
        Ok(())
    }

    fn take_off_lease(&mut self) -> Result<()> {
        self.lease = None;
        Ok(())
    }
}

//! A guest as it moves to another host while it runs, and as it comes from one.

use std::path::PathBuf;

use async_trait::async_trait;

use super::plan::{Plan, RunningPlan};
use crate::error::Result;
use crate::fleet::LeaseCheck;
use crate::migration::GuestFlows;

/// Where a guest's virtual machine is in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In none, or its guest runs while it is being sent.
    Ordinary,
    /// It waits for its guest.
    Waiting,
    /// All of its guest is there, and stands still.
    Arrived,
    /// Its guest stands still while the rest is sent, and goes on by itself if that fails.
    Switching,
    /// Its guest stands still until somebody says where it goes on.
    Released,
}

/// A guest as it moves to another host while it runs, and as it comes from one.
#[async_trait]
pub trait MovableRuntime: Send + Sync {
    /// Where its virtual machine is in a move.
    async fn stage(&self) -> Result<Stage>;

    /// Where its virtual machine is asked.
    fn api_socket(&self) -> PathBuf;

    /// Sets up a virtual machine that waits for the guest: its devices are there and nothing reaches
    /// them, its disks are served by nobody.
    async fn prepare(
        &mut self,
        plan: &Plan,
        running: RunningPlan,
        lease: Option<LeaseCheck>,
    ) -> Result<()>;

    /// Lets the guest that has come go on, with its disks and interfaces. What was done before it failed
    /// may be done again.
    async fn land(&mut self, plan: &Plan) -> Result<()>;

    /// Lets the guest stay, if it is being sent and was not released.
    async fn cancel(&self);

    /// Keeps the guest stopped, and ends its disks' backends.
    async fn release(&mut self) -> Result<()>;

    /// The flows of its interfaces that can move, and how many of its ports have an external one, which can't.
    async fn leaving_flows(&self) -> Result<(GuestFlows, u32)>;

    /// Lets a guest that was released go on here, with its disks.
    async fn take_back(&mut self) -> Result<()>;
}

//! The flows of guests that move between hosts.

use keelson_ebpf::{DatapathError, LeavingFlows, MovedFlows};

use super::HostNetwork;
use crate::{AgentError, error::Result};

impl HostNetwork {
    /// The flows of a guest's interface, which leaves this host.
    pub async fn leaving_flows(&self, guest: &str, interface: &str) -> Result<LeavingFlows> {
        let device = Self::device_of(guest, interface);
        let read = self
            .datapath
            .with(move |datapath| datapath.leaving_flows(&device));
        match read.await {
            // It is about to go, or to come.
            Err(AgentError::Datapath(DatapathError::NotAttached { .. })) => {
                Ok(LeavingFlows::default())
            }
            read => read,
        }
    }

    /// Gives a guest's interface the flows that came with the guest; how many it took.
    pub async fn take_flows(
        &self,
        guest: &str,
        interface: &str,
        flows: MovedFlows,
    ) -> Result<usize> {
        let device = Self::device_of(guest, interface);
        self.datapath
            .with(move |datapath| datapath.take_flows(&device, &flows))
            .await
    }
}

//! What guests have used.

use std::time::Duration;

use keelson_api::proto::{GuestUsage, UsageResponse};
use keelson_api::{Kind, Object};

use crate::error::Result;
use crate::fleet::Instant;
use crate::host::HostNetwork;
use crate::{Agent, guest};

/// What the guests on this host have used.
///
/// # Errors
/// Those of the store and of the network.
pub async fn read(agent: &Agent) -> Result<UsageResponse> {
    let statistics = agent.network.statistics().await?;
    let (objects, _) = agent.objects.list(Kind::VirtualMachine).await?;
    let read = {
        let agent = agent.clone();
        tokio::task::spawn_blocking(move || guest::usage(&agent))
    };
    let used = read.await.unwrap_or_default();
    let guests = used.into_iter().map(|(name, used)| {
        let mut usage = GuestUsage {
            cpu_nanoseconds: nanoseconds(used.machine.cpu + used.disks.cpu),
            memory_bytes: used.machine.memory_bytes,
            read_bytes: used.disks.read_bytes,
            written_bytes: used.disks.written_bytes,
            ..GuestUsage::default()
        };
        for interface in interfaces_of(&objects, &name) {
            if let Some((counters, _)) = statistics.get(&HostNetwork::device_of(&name, &interface))
            {
                usage.sent_bytes += counters.from_guest.passed.bytes;
                usage.received_bytes += counters.to_guest.passed.bytes;
            }
        }
        usage.name = name;
        usage
    });
    Ok(UsageResponse {
        nanoseconds: nanoseconds(Instant::now().time_since_boot()),
        guests: guests.collect(),
    })
}

fn interfaces_of(objects: &[crate::objects::Stored<Object>], guest: &str) -> Vec<String> {
    let mut objects = objects.iter().map(|stored| &stored.object);
    match objects.find(|object| object.metadata().name == guest) {
        Some(Object::VirtualMachine(guest)) => {
            let interfaces = guest.spec.interfaces.iter();
            interfaces.map(|interface| interface.name.clone()).collect()
        }
        _ => Vec::new(),
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

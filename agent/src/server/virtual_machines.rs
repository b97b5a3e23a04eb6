//! What is done to one guest.

use std::io::SeekFrom;
use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use keelson_api::proto::virtual_machines_server::VirtualMachines;
use keelson_api::proto::{
    CancelMigrationRequest, CaptureRequest, CapturedPacket, ConsoleInput, ConsoleOutput,
    CountersRequest, CountersResponse, DeleteSnapshotRequest, DeleteSnapshotResponse,
    DirectionCounters, DropCounter, FlowsRequest, FlowsResponse, InterfaceCounters,
    ListSnapshotsRequest, ListSnapshotsResponse, LogsChunk, LogsRequest, MigrateRequest, Object,
    PacketCounter, PacketEvent, PacketsRequest, PauseRequest, RateLimit, RestoreRequest,
    ResumeRequest, RuleCounter, StartRequest, StopRequest, TakeSnapshotRequest,
    TakeSnapshotResponse, UsageRequest, UsageResponse,
};
use keelson_api::{BitRate, PowerState, Resource, SecurityGroup, VirtualMachine};
use keelson_ebpf::{Direction, Tally};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tonic::{Request, Response, Status, Streaming};

use super::{capture, console, packets, snapshots, status, to_proto, usage};
use crate::guest::{GuestPaths, GuestSnapshots, Machine, rule_counters};
use crate::migration;
use crate::objects::set_power_state;
use crate::{Agent, AgentError};

/// How much of a log is read at once.
const CHUNK: usize = 64 << 10;
/// How often a log that is followed is looked at again.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// What is done to one guest.
#[derive(Debug)]
pub struct VirtualMachinesService {
    agent: Agent,
}

impl VirtualMachinesService {
    /// The service of this agent.
    pub fn new(agent: Agent) -> Self {
        Self { agent }
    }

    async fn guest(&self, name: &str) -> Result<VirtualMachine, Status> {
        let guest = self.agent.objects.get_typed(name).await;
        let guest: VirtualMachine = guest.map_err(status)?.object;
        if self.agent.fleet.is_here(&guest) {
            return Ok(guest);
        }
        let here = self.agent.fleet.host();
        Err(Status::failed_precondition(match &guest.status.placement {
            Some(placement) => format!(
                "VirtualMachine/{name} is placed on {}, and this is the agent of {here}; ask there",
                placement.host
            ),
            None => format!("VirtualMachine/{name} is placed on no host yet"),
        }))
    }

    /// Those of the groups that there are.
    async fn groups(&self, names: &[String]) -> Result<Vec<SecurityGroup>, Status> {
        let mut groups = Vec::new();
        for name in names {
            match self.agent.objects.get_typed::<SecurityGroup>(name).await {
                Ok(group) => groups.push(group.object),
                Err(AgentError::NotFound { .. }) => {}
                Err(error) => return Err(status(error)),
            }
        }
        Ok(groups)
    }
}

#[tonic::async_trait]
impl VirtualMachines for VirtualMachinesService {
    async fn start(&self, request: Request<StartRequest>) -> Result<Response<Object>, Status> {
        let name = request.into_inner().name;
        let object = set_power_state(&self.agent.objects, &name, PowerState::Running).await;
        Ok(Response::new(to_proto(&object.map_err(status)?)?))
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<Object>, Status> {
        let StopRequest { name, force } = request.into_inner();
        if force {
            // Only its own host can kill it.
            self.guest(&name).await?;
        }
        let object = set_power_state(&self.agent.objects, &name, PowerState::Stopped).await;
        let object = object.map_err(status)?;
        // A start that doesn't come about is given up, with what it was to begin from.
        GuestSnapshots::new(&self.agent.config, &name)
            .forget_restore()
            .map_err(status)?;
        if force {
            let paths = GuestPaths::new(&self.agent.config, &name);
            if let Some(Ok(machine)) = Machine::find(&paths).map_err(status)? {
                machine.process.kill().await;
            }
        }
        Ok(Response::new(to_proto(&object)?))
    }

    async fn pause(&self, request: Request<PauseRequest>) -> Result<Response<Object>, Status> {
        let name = request.into_inner().name;
        self.guest(&name).await?;
        let object = snapshots::pause(&self.agent, &name).await.map_err(status)?;
        Ok(Response::new(to_proto(&object)?))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<Object>, Status> {
        let name = request.into_inner().name;
        let guest = self.guest(&name).await?;
        if let Some(active) = migration::transitions::active(&guest) {
            return Err(Status::failed_precondition(format!(
                "VirtualMachine/{name} is moving to {}, and goes on by itself",
                active.destination
            )));
        }
        let object = snapshots::resume(&self.agent, &name).await;
        Ok(Response::new(to_proto(&object.map_err(status)?)?))
    }

    async fn migrate(&self, request: Request<MigrateRequest>) -> Result<Response<Object>, Status> {
        let request = request.into_inner();
        let given = |value: u64| (value > 0).then_some(value);
        let limits = keelson_api::MigrationLimits {
            bytes_per_second: given(request.bytes_per_second),
            downtime_milliseconds: given(request.downtime_milliseconds),
        };
        let wanted = Some(request.host.as_str()).filter(|host| !host.is_empty());
        let stored = migration::request(&self.agent, &request.name, wanted, limits).await;
        let object = stored.map_err(status)?.object.into_object();
        Ok(Response::new(to_proto(&object)?))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<Object>, Status> {
        let stored = migration::cancel(&self.agent, &request.into_inner().name).await;
        let object = stored.map_err(status)?.object.into_object();
        Ok(Response::new(to_proto(&object)?))
    }

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        let taken = snapshots::take(&self.agent, request.into_inner()).await;
        Ok(Response::new(taken.map_err(status)?))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let list = snapshots::list(&self.agent, &request.into_inner().name).await;
        Ok(Response::new(ListSnapshotsResponse {
            snapshots: list.map_err(status)?,
        }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let DeleteSnapshotRequest { name, snapshot } = request.into_inner();
        let deleted = snapshots::delete(&self.agent, &name, &snapshot).await;
        deleted.map_err(status)?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<Object>, Status> {
        let RestoreRequest { name, snapshot } = request.into_inner();
        let object = snapshots::restore(&self.agent, &name, &snapshot).await;
        Ok(Response::new(to_proto(&object.map_err(status)?)?))
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("the first message must name the guest"))?;
        self.guest(&first.name).await?;
        let paths = GuestPaths::new(&self.agent.config, &first.name);
        let output = console::attach(&paths, first, input).await?;
        Ok(Response::new(output.boxed()))
    }

    type LogsStream = Pin<Box<dyn Stream<Item = Result<LogsChunk, Status>> + Send>>;

    async fn logs(
        &self,
        request: Request<LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        self.guest(&request.name).await?;
        let path = GuestPaths::new(&self.agent.config, &request.name).console_log();
        let mut file = File::open(&path).await.map_err(|error| {
            Status::failed_precondition(format!(
                "VirtualMachine/{} has no console log yet ({}: {error}); it was never started",
                request.name,
                path.display()
            ))
        })?;
        if request.tail_lines > 0 {
            let at = tail_position(&mut file, request.tail_lines).await;
            let at = at.map_err(|error| Status::internal(error.to_string()))?;
            file.seek(SeekFrom::Start(at))
                .await
                .map_err(|error| Status::internal(error.to_string()))?;
        }
        let chunks = futures::stream::try_unfold(file, move |mut file| async move {
            loop {
                let mut data = vec![0; CHUNK];
                let length = file.read(&mut data).await?;
                data.truncate(length);
                if length > 0 {
                    return Ok(Some((LogsChunk { data }, file)));
                }
                if !request.follow {
                    return Ok(None);
                }
                tokio::time::sleep(FOLLOW_INTERVAL).await;
            }
        });
        let chunks = chunks.map(|chunk: std::io::Result<_>| {
            chunk.map_err(|error| Status::internal(error.to_string()))
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn counters(
        &self,
        request: Request<CountersRequest>,
    ) -> Result<Response<CountersResponse>, Status> {
        let name = request.into_inner().name;
        let guest = self.guest(&name).await?;
        let mut interfaces = Vec::new();
        for interface in &guest.spec.interfaces {
            match self.agent.network.counters(&name, &interface.name).await {
                Ok((device, counters)) => {
                    let groups = self.groups(&interface.security_groups).await?;
                    let mut from_guest =
                        direction(&counters.from_guest, &groups, Direction::FromGuest);
                    let mut to_guest = direction(&counters.to_guest, &groups, Direction::ToGuest);
                    from_guest.limit = rate_limit(&interface.limits.from_guest);
                    to_guest.limit = rate_limit(&interface.limits.to_guest);
                    interfaces.push(InterfaceCounters {
                        name: interface.name.clone(),
                        device,
                        from_guest: Some(from_guest),
                        to_guest: Some(to_guest),
                    });
                }
                Err(AgentError::Datapath(keelson_ebpf::DatapathError::NotAttached { .. })) => {}
                Err(error) => return Err(status(error)),
            }
        }
        Ok(Response::new(CountersResponse { interfaces }))
    }

    async fn usage(&self, _: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let usage = usage::read(&self.agent).await;
        Ok(Response::new(usage.map_err(status)?))
    }

    async fn flows(
        &self,
        request: Request<FlowsRequest>,
    ) -> Result<Response<FlowsResponse>, Status> {
        let name = request.into_inner().name;
        let guest = self.guest(&name).await?;
        let mut flows = Vec::new();
        for interface in &guest.spec.interfaces {
            let interface = &interface.name;
            match self.agent.network.flows(&name, interface).await {
                Ok(found) => {
                    flows.extend(found.iter().map(|flow| packets::flow(interface, flow)));
                }
                Err(AgentError::Datapath(keelson_ebpf::DatapathError::NotAttached { .. })) => {}
                Err(error) => return Err(status(error)),
            }
        }
        Ok(Response::new(FlowsResponse { flows }))
    }

    type PacketsStream = Pin<Box<dyn Stream<Item = Result<PacketEvent, Status>> + Send>>;

    async fn packets(
        &self,
        request: Request<PacketsRequest>,
    ) -> Result<Response<Self::PacketsStream>, Status> {
        let request = request.into_inner();
        if !request.name.is_empty() {
            self.guest(&request.name).await?;
        }
        Ok(Response::new(packets::follow(&self.agent, request).boxed()))
    }

    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CapturedPacket, Status>> + Send>>;

    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let request = request.into_inner();
        let guest = self.guest(&request.name).await?;
        let packets = capture::follow(&self.agent, &guest, request).await?;
        Ok(Response::new(packets.boxed()))
    }
}

/// Where the last `lines` lines of a file begin.
async fn tail_position(file: &mut File, lines: u32) -> std::io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0)).await?;
    let mut left = u64::from(lines);
    let mut at_end = true;
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        file.seek(SeekFrom::Start(start)).await?;
        let mut data = Vec::new();
        file.take(end - start).read_to_end(&mut data).await?;
        for (index, byte) in data.iter().enumerate().rev() {
            // The newline that ends the last line separates nothing.
            if *byte == b'\n' && !std::mem::take(&mut at_end) {
                left -= 1;
                if left == 0 {
                    return Ok(start + index as u64 + 1);
                }
            }
            at_end = false;
        }
        end = start;
    }
    Ok(0)
}

fn direction(
    counters: &keelson_ebpf::DirectionCounters,
    groups: &[SecurityGroup],
    direction: Direction,
) -> DirectionCounters {
    let tally = |tally: &Tally| {
        Some(PacketCounter {
            packets: tally.packets,
            bytes: tally.bytes,
        })
    };
    DirectionCounters {
        passed: tally(&counters.passed),
        dropped: counters
            .dropped
            .iter()
            .map(|(reason, count)| DropCounter {
                reason: reason.to_string(),
                count: tally(count),
            })
            .collect(),
        rules: rule_counters(groups, direction)
            .iter()
            .filter_map(|rule| {
                let count = counters.allowed.get(&rule.counter)?;
                Some(RuleCounter {
                    rule: rule.rule(direction),
                    count: tally(count),
                })
            })
            .collect(),
        limit: None,
    }
}

fn rate_limit(limit: &keelson_api::RateLimit) -> Option<RateLimit> {
    let burst = limit.burst.duration().as_millis();
    let bits = limit.bits_per_second.map(BitRate::bits_per_second);
    (!limit.is_unlimited()).then(|| RateLimit {
        bits_per_second: bits.unwrap_or(0),
        packets_per_second: limit.packets_per_second.unwrap_or(0),
        burst_milliseconds: u64::try_from(burst).unwrap_or(u64::MAX),
    })
}

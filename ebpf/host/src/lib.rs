//! Loads and attaches the eBPF programs and compiles policy to their maps.
//!
//! A [`Datapath`] owns the maps and hooks below one folder of a BPF file system. They outlive the
//! process: policy stays in force while nobody runs, and the next [`Datapath::open`] adopts what it
//! finds, replacing the programs in place.
//!
//! Calls block (system calls, and an RCU grace period where rules are replaced): async callers use
//! a blocking thread. Interface names are those of the calling thread's network namespace.

mod address;
mod capture;
mod compile;
mod counters;
mod datapath;
mod error;
mod events;
mod flow_list;
mod gateways;
mod grace_period;
mod hook;
mod inner_map;
mod interface;
mod kernel;
mod limits;
mod maglev;
mod migration;
mod moved_flows;
mod nat;
mod object;
mod pin_root;
mod policy;
mod questions;
mod rule_counters;
mod rule_tables;
mod served;
mod services;
mod slots;
mod stations;
mod trial;
mod tunnel;

pub use address::{AddressError, IpPrefix, MacAddress};
pub use capture::{CaptureReader, CapturedPacket, MAX_SNAP_LENGTH};
pub use counters::{DirectionCounters, InterfaceCounters};
pub use datapath::{Attached, Datapath, DatapathConfig};
pub use error::DatapathError;
pub use events::{EventReader, Happening, Observed, PacketEvent};
pub use flow_list::{Flow, FlowPhase, FlowUse};
pub use hook::{HookChoice, HookMode};
pub use keelson_ebpf_common::{Direction, DropReason, SERVICE_MAC, Tally};
pub use limits::{InterfaceLimits, RateLimit};
pub use moved_flows::{BadFlow, LeavingFlows, MovedFlow, MovedFlows, MovedTranslation};
pub use nat::{ExternalUse, MAX_EXTERNAL_ADDRESSES, MAX_FORWARDED_PORTS, PortForward, SourceNat};
pub use policy::{
    EgressPolicy, InterfacePolicy, MAX_COUNTERS, MAX_RULES, Protocol, Rule, UnknownProtocol,
};
pub use questions::{AnswerSender, Answers, Question, QuestionReader};
pub use served::ServiceUse;
pub use services::{MAX_BACKENDS, MAX_COUNTED_BACKENDS, MAX_SERVICES, Service, ServiceBackend};
pub use trial::{RunCost, Verdict, count_run_costs};
pub use tunnel::{MAX_OVERLAYS, MAX_REMOTE_STATIONS, RemoteInterface, Tunnel, TunnelCounters};

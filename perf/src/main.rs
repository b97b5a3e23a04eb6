//! `perf`: benchmarks of Keelson beside its peers, in the same run.

mod agent;
mod blk;
mod command;
mod machine;
mod net;
mod process;
mod report;
mod state;
mod vm;

use clap::{Parser, Subcommand};

/// Benchmarks of Keelson beside its peers: the same work, alternating, several rounds.
#[derive(Debug, Parser)]
#[command(name = "perf", version, max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    area: Area,
}

#[derive(Debug, Subcommand)]
enum Area {
    /// The state store beside etcd.
    State(state::Options),
    /// keelson-blk beside qemu-storage-daemon and io_uring straight on the file.
    Blk(blk::Options),
    /// The eBPF network beside a bridge with nftables and Open vSwitch.
    Net(net::Options),
    /// The VMM beside QEMU.
    Vm(vm::Options),
    /// The agent: guests applied, idle, failing over, and fleets of many hosts.
    Agent(agent::Options),
}

fn main() -> anyhow::Result<()> {
    match Options::parse().area {
        Area::State(options) => state::run(&options),
        Area::Blk(options) => blk::run(&options),
        Area::Net(options) => net::run(&options),
        Area::Vm(options) => vm::run(&options),
        Area::Agent(options) => agent::run(&options),
    }
}

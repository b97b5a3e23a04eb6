//! `keelson host`

use clap::Args;
use keelson_api::proto::InfoRequest;
use serde_json::json;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, line, print_value};

/// Show what the agent's host is.
#[derive(Args)]
pub struct Host {
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Host {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let info = client.host.info(InfoRequest {}).await?.into_inner();
        if matches!(self.output, Format::Json | Format::Yaml) {
            return print_value(
                self.output,
                &json!({
                    "version": info.version,
                    "hostname": info.hostname,
                    "kernel": info.kernel,
                    "cpus": info.cpus,
                    "memoryBytes": info.memory_bytes,
                    "state": info.state,
                    "networkHook": info.network_hook,
                }),
            );
        }
        line(&format!(
            "Host:     {} (Linux {})",
            info.hostname, info.kernel
        ))?;
        line(&format!("Agent:    keelsond {}", info.version))?;
        line(&format!("CPUs:     {}", info.cpus))?;
        line(&format!("Memory:   {} MiB", info.memory_bytes >> 20))?;
        line(&format!("State:    {}", info.state))?;
        line(&format!("Network:  eBPF attached by {}", info.network_hook))
    }
}

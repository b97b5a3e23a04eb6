//! `keelson-vmm`: runs one guest.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use keelson_vmm::api::ExitReason;
use keelson_vmm::config::GuestConfig;
use tracing_subscriber::EnvFilter;

/// Runs one guest on /dev/kvm.
///
/// Exit codes: 0 the guest shut down or was killed by request, 1 runtime failure, 2 bad
/// configuration or usage, 3 kernel or initrd can't be loaded, 4 no /dev/kvm or no permission,
/// 5 disk backend or TAP can't be connected. The last line on stderr says why.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The guest's configuration, a JSON file.
    #[arg(long, value_name = "GUEST.json")]
    config: PathBuf,
    /// The Unix socket on which to serve the guest's API.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// What to log to stderr: `warn`, or `keelson_vmm=debug`, as RUST_LOG.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log_level: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = match EnvFilter::try_new(&arguments.log_level) {
        Ok(filter) => filter,
        Err(e) => return fail(2, &format!("--log-level {}: {e}", arguments.log_level)),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let config = match GuestConfig::load(&arguments.config) {
        Ok(config) => config,
        Err(e) => return fail(2, &e.to_string()),
    };
    match keelson_vmm::guest::run(&config, &arguments.api_socket) {
        Ok(exit) => {
            let failed = matches!(exit.reason, ExitReason::TripleFault | ExitReason::Error);
            fail(u8::from(failed), &exit.message)
        }
        Err(e) => fail(e.exit_code(), &e.to_string()),
    }
}

/// Says why the process ends, and with which code.
fn fail(code: u8, reason: &str) -> ExitCode {
    eprintln!("{reason}");
    ExitCode::from(code)
}

//! The host agent's daemon.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use keelson_agent::config::Config;
use keelson_agent::fleet::{Instant, guard};
use keelson_agent::{Agent, Reconciler, serve, serve_metrics};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Runs KVM guests on this host as their objects in the state store desire.
///
/// Exit codes: 0 after SIGTERM or SIGINT, 1 on failure, 2 on wrong usage. Guests keep running when
/// the daemon ends and are found again when it starts.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration [default: /etc/keelson/keelsond.toml, if it exists].
    #[arg(long, env = "KEELSON_CONFIG")]
    config: Option<PathBuf>,
    /// The state store, instead of the configuration's: embedded:PATH or etcd:URL[,URL].
    #[arg(long, env = "KEELSON_STATE")]
    state: Option<String>,
    /// Serve metrics over HTTP on this address, in Prometheus' text form; on 127.0.0.1:9469 where none
    /// is given. Instead of the configuration's `metrics_listen`.
    #[arg(
        long,
        env = "KEELSON_METRICS_LISTEN",
        value_name = "ADDRESS",
        num_args = 0..=1,
        default_missing_value = "127.0.0.1:9469"
    )]
    metrics_listen: Option<SocketAddr>,
    /// What to log, such as `info` or `keelson_agent=debug`.
    #[arg(long, env = "KEELSON_LOG", default_value = "info")]
    log: String,
    /// Log one JSON object per line.
    #[arg(long)]
    log_json: bool,
    /// Check the configuration and the host, then exit.
    #[arg(long)]
    check: bool,
    /// Kill the guests of this run directory that run on the host's lease when the deadline passes; an
    /// agent starts it so.
    #[arg(long, hide = true, requires = "guard_deadline")]
    guard: Option<PathBuf>,
    /// The deadline, in nanoseconds since boot.
    #[arg(long, hide = true)]
    guard_deadline: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let (Some(run_directory), Some(deadline)) = (&arguments.guard, arguments.guard_deadline) {
        let deadline = Instant::since_boot(Duration::from_nanos(deadline));
        return match guard::run(run_directory, deadline) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("keelsond --guard: {error}");
                ExitCode::FAILURE
            }
        };
    }
    keelson_agent::arm_failpoints();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keelsond: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&arguments.log).context("--log")?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if arguments.log_json {
        subscriber.json().init();
    } else {
        subscriber.with_ansi(false).init();
    }
    let mut config = Config::load(arguments.config.as_deref())?;
    if let Some(state) = &arguments.state {
        config.state.clone_from(state);
    }
    config.metrics_listen = arguments.metrics_listen.or(config.metrics_listen);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(config, arguments.check))
}

async fn run(config: Config, check: bool) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let metrics_listen = config.metrics_listen;
    let agent = Agent::open(config).await?;
    if check {
        println!("this host can run guests");
        return Ok(());
    }
    if let Some(address) = metrics_listen {
        tokio::spawn(serve_metrics(agent.clone(), address).await?);
    }
    agent.join_fleet().await?;
    let reconciler = Reconciler::new(agent.clone());
    let beats = reconciler.beats();
    let reconciling = tokio::spawn(reconciler.run());
    let watchdog = tokio::spawn(feed_watchdog(beats));
    // Without systemd there is nobody to notify, which is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "keelsond is ready");
    let served = serve(agent.clone(), async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    watchdog.abort();
    reconciling.abort();
    agent.close().await?;
    served?;
    tracing::info!("keelsond ends; guests keep running");
    Ok(())
}

/// Tells systemd's watchdog that the reconciler lives, as long as it does.
async fn feed_watchdog(beats: Arc<AtomicU64>) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut seen = None;
    loop {
        let now = beats.load(Ordering::Relaxed);
        if seen != Some(now) {
            seen = Some(now);
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
        tokio::time::sleep(limit / 3).await;
    }
}

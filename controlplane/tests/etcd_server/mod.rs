//! A real etcd server for one test.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keelson_controlplane::etcd::{EtcdOptions, EtcdStore};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A member of its own cluster of one, killed when this is dropped.
pub struct EtcdServer {
    directory: TempDir,
    client_url: String,
    peer_url: String,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts a server and waits until it answers.
    pub async fn start() -> Self {
        let mut server = Self {
            directory: tempfile::tempdir().unwrap(),
            client_url: free_url(),
            peer_url: free_url(),
            process: None,
        };
        server.run();
        let mut options = server.options();
        options.timeout = Duration::from_secs(30);
        if let Err(error) = EtcdStore::open(options).await {
            let log = std::fs::read_to_string(server.log()).unwrap_or_default();
            panic!("etcd did not start: {error}\n{log}");
        }
        server
    }

    pub fn url(&self) -> &str {
        &self.client_url
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions::new(vec![self.client_url.clone()])
    }

    /// Runs the server on its directory and addresses.
    pub fn run(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        let process = Command::new("etcd")
            .args(["--name", "test", "--logger", "zap"])
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
            .args(["--listen-client-urls", &self.client_url])
            .args(["--advertise-client-urls", &self.client_url])
            .args(["--listen-peer-urls", &self.peer_url])
            .args(["--initial-advertise-peer-urls", &self.peer_url])
            .args(["--initial-cluster", &format!("test={}", self.peer_url)])
            // Leases of 1 s need a short election timeout.
            .args(["--heartbeat-interval", "10", "--election-timeout", "100"])
            .args(["--experimental-watch-progress-notify-interval", "1s"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.process = Some(process.unwrap_or_else(|error| {
            panic!("run etcd: {error}; install Debian's package etcd-server")
        }));
    }

    /// Kills the server as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Stops the server from doing anything, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        let process = self.process.as_ref().unwrap().id();
        let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        kill_process(pid, signal).unwrap();
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// A free port on a loopback address that belongs to this process, so that no other test takes it
/// before the server does.
pub fn free_url() -> String {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, a.saturating_add(1), b, c.clamp(1, 254));
    let listener = TcpListener::bind((address, 0)).unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

//! A real server of etcd's API for one test: etcd, or keelson-state.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keelson_controlplane::etcd::{EtcdOptions, EtcdStore, Server};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A member of its own cluster of one, killed when this is dropped.
pub struct EtcdServer {
    directory: TempDir,
    client_url: String,
    peer_url: String,
    process: Option<Child>,
    server: Server,
}

impl EtcdServer {
    /// Starts etcd and waits until it answers.
    pub async fn start() -> Self {
        Self::start_server(Server::Etcd).await
    }

    /// Starts a server and waits until it answers.
    pub async fn start_server(server: Server) -> Self {
        let mut server = Self {
            server,
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
            panic!("the server did not start: {error}\n{log}");
        }
        server
    }

    pub fn url(&self) -> &str {
        &self.client_url
    }

    pub fn options(&self) -> EtcdOptions {
        let mut options = EtcdOptions::new(vec![self.client_url.clone()]);
        options.server = self.server;
        options
    }

    /// Runs the server on its directory and addresses.
    pub fn run(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        let mut command = match self.server {
            Server::Etcd => {
                let mut etcd = Command::new("etcd");
                etcd.args(["--logger", "zap"])
                    .args(["--experimental-watch-progress-notify-interval", "1s"]);
                etcd
            }
            Server::KeelsonState => {
                let mut state = Command::new(keelson_state());
                state.args(["--watch-progress-notify-interval", "1s"]);
                state
            }
        };
        let process = command
            .args(["--name", "test"])
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
            .args(["--listen-client-urls", &self.client_url])
            .args(["--advertise-client-urls", &self.client_url])
            .args(["--listen-peer-urls", &self.peer_url])
            .args(["--initial-advertise-peer-urls", &self.peer_url])
            .args(["--initial-cluster", &format!("test={}", self.peer_url)])
            // Leases of 1 s need a short election timeout.
            .args(["--heartbeat-interval", "10", "--election-timeout", "100"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.process = Some(process.unwrap_or_else(|error| {
            panic!(
                "run {:?}: {error}; `./test` installs etcd and builds keelson-state",
                self.server
            )
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

/// `keelson-state`, built beside the tests.
fn keelson_state() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("keelson-state")
}

/// A free port on a loopback address that belongs to this process, so that no other test takes it
/// before the server does.
pub fn free_url() -> String {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, a.saturating_add(1), b, c.clamp(1, 254));
    let listener = TcpListener::bind((address, 0)).unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

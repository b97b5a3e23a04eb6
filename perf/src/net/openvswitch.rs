//! The peer: Open vSwitch with its kernel datapath, set up as OpenStack's and OVN's hosts set it up: ports tied to
//! their guests' addresses, connections tracked by `ct()`, and rules that are asked for new connections only.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_ebpf::MacAddress;

use super::hosts::{CLIENT, Rule, SERVER};

/// How it is set up, for the report.
pub const METHOD: &str = "its kernel module, a bridge that does what its flows say (fail_mode secure), flows that tie \
                          each guest's device to its addresses, then ct(), by which established connections pass, \
                          and one flow for each rule, that new ones are committed by; every packet of the load takes \
                          two lookups of cached megaflows and one of the connection";
/// What it needs, beside the kernel's module.
pub const PROGRAMS: [&str; 5] = [
    "/usr/lib/openvswitch-switch/ovs-vswitchd",
    "/usr/sbin/ovsdb-server",
    "/usr/bin/ovsdb-tool",
    "/usr/bin/ovs-vsctl",
    "/usr/bin/ovs-ofctl",
];
/// The form of its database.
pub const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// The kernel's module.
pub const MODULE: &str = "openvswitch";
const PATIENCE: Duration = Duration::from_mins(2);

/// Why it can't be measured on this machine's kernel, or nothing.
pub fn hindrance() -> Option<&'static str> {
    let is_loaded = || Path::new("/sys/module").join(MODULE).exists();
    let load = || {
        let _ = Command::new("modprobe")
            .args(["--quiet", MODULE])
            .stderr(Stdio::null())
            .status();
    };
    if !is_installed() {
        return Some("Debian's package openvswitch-switch is not installed");
    }
    if !is_loaded() {
        load();
    }
    (!is_loaded()).then_some("this kernel has no module openvswitch")
}

/// Whether its programs are on this machine.
pub fn is_installed() -> bool {
    PROGRAMS.into_iter().all(|path| program(path).is_ok()) && Path::new(SCHEMA).exists()
}

/// Its version.
pub fn version() -> Option<String> {
    crate::command::version_of(&program(PROGRAMS[0]).ok()?).ok()
}

/// Where one of [`PROGRAMS`] is: there, or anywhere in the path, as in the lab.
fn program(packaged: &str) -> anyhow::Result<PathBuf> {
    let packaged = Path::new(packaged);
    let name = packaged.file_name().unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(name));
    if packaged.exists() {
        return Ok(packaged.into());
    }
    places
        .find(|place| place.exists())
        .with_context(|| format!("find {} (openvswitch-switch)", packaged.display()))
}

/// A running switch of one network namespace. Dropping it ends it.
#[derive(Debug)]
pub struct OpenVswitch {
    place: tempfile::TempDir,
    processes: Vec<Child>,
}

impl OpenVswitch {
    /// Starts the switch in the calling thread's namespace, with the guests' devices as its ports, and puts
    /// the rules in force.
    pub fn start(rules: &[Rule]) -> anyhow::Result<Self> {
        let mut switch = Self {
            place: tempfile::tempdir()?,
            processes: Vec::new(),
        };
        let database = switch.path("conf.db");
        switch.run(PROGRAMS[2], &["create", &database, SCHEMA], "")?;
        let remote = format!("--remote=punix:{}", switch.path("db.sock"));
        switch.spawn(PROGRAMS[1], &[&database, &remote])?;
        let database = format!("unix:{}", switch.path("db.sock"));
        switch.until("its database", |switch| {
            Path::new(&switch.path("db.sock")).exists()
        })?;
        let client = format!("--db={database}");
        switch.run(PROGRAMS[3], &[&client, "--no-wait", "init"], "")?;
        switch.spawn(PROGRAMS[0], &[&database])?;
        let limit = format!("--timeout={}", PATIENCE.as_secs());
        let words = "add-br br0 -- set bridge br0 datapath_type=system fail_mode=secure \
                     -- add-port br0 hc -- set interface hc ofport_request=1 \
                     -- add-port br0 hs -- set interface hs ofport_request=2";
        let arguments: Vec<&str> = [client.as_str(), limit.as_str()]
            .into_iter()
            .chain(words.split_whitespace())
            .collect();
        switch.run(PROGRAMS[3], &arguments, "")?;
        let bridge = format!("unix:{}", switch.path("br0.mgmt"));
        switch.run(
            PROGRAMS[4],
            &["--bundle", "add-flows", &bridge, "-"],
            &flows(rules)?,
        )?;
        Ok(switch)
    }

    fn path(&self, name: &str) -> String {
        self.place.path().join(name).display().to_string()
    }

    fn command(&self, packaged: &str) -> anyhow::Result<Command> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))?;
        let mut command = Command::new(program(packaged)?);
        command
            .env("OVS_RUNDIR", self.place.path())
            .env("OVS_DBDIR", self.place.path())
            .env("OVS_LOGDIR", self.place.path())
            .env("OVS_SYSCONFDIR", self.place.path())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }

    fn spawn(&mut self, packaged: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = self.command(packaged)?;
        command.args(arguments).stdin(Stdio::null());
        let child = command
            .spawn()
            .with_context(|| format!("start {packaged}"))?;
        self.processes.push(child);
        Ok(())
    }

    fn run(&self, packaged: &str, arguments: &[&str], input: &str) -> anyhow::Result<()> {
        let mut command = self.command(packaged)?;
        command.args(arguments).stdin(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("start {packaged}"))?;
        let mut stdin = child.stdin.take().context("its input")?;
        let written = stdin.write_all(input.as_bytes());
        drop(stdin);
        let status = child.wait()?;
        anyhow::ensure!(
            status.success() && written.is_ok(),
            "{packaged} failed: {}",
            std::fs::read_to_string(self.path("log")).unwrap_or_default()
        );
        Ok(())
    }

    fn until(&self, what: &str, ready: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !ready(self) {
            anyhow::ensure!(begun.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for OpenVswitch {
    fn drop(&mut self) {
        // The namespace's end removes the kernel's datapath.
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// The flows: who may send as whom, what is tracked, which new connections may be.
fn flows(rules: &[Rule]) -> anyhow::Result<String> {
    let mut text = String::from("table=0,priority=0,actions=drop\n");
    for (port, end) in [(1, CLIENT), (2, SERVER)] {
        let mac = MacAddress(end.mac);
        let address = end.address;
        write!(
            text,
            "table=0,priority=100,in_port={port},ip,dl_src={mac},nw_src={address},actions=ct(table=1,zone=1)\n\
             table=0,priority=100,in_port={port},arp,dl_src={mac},arp_sha={mac},arp_spa={address},actions=resubmit(,4)\n\
             table=4,priority=100,dl_dst={mac},actions=output:{port}\n"
        )?;
    }
    let server = SERVER.address;
    write!(
        text,
        "table=1,priority=100,ct_state=+trk+est,ip,actions=resubmit(,4)\n\
         table=1,priority=100,ct_state=+trk+rel,ip,actions=resubmit(,4)\n\
         table=1,priority=100,ct_state=+trk+inv,ip,actions=drop\n\
         table=1,priority=90,ct_state=+trk+new,ip,nw_dst={server},actions=resubmit(,2)\n\
         table=1,priority=90,ct_state=+trk+new,ip,nw_src={server},actions=resubmit(,3)\n\
         table=3,priority=100,ip,actions=ct(commit,zone=1),resubmit(,4)\n\
         table=4,priority=90,dl_dst=ff:ff:ff:ff:ff:ff,actions=flood\n"
    )?;
    if rules.is_empty() {
        text.push_str("table=2,priority=0,actions=resubmit(,3)\n");
    }
    for rule in rules {
        writeln!(
            text,
            "table=2,priority=100,{protocol},nw_src={peer},tp_dst={port},actions=resubmit(,3)",
            protocol = rule.protocol,
            peer = rule.peer,
            port = rule.port
        )?;
    }
    Ok(text)
}

//! What runs on a host, and what can be done to it from outside.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;

use keelson_vmm_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process};

use super::Host;

impl Host {
    /// Types a line on a guest's console.
    ///
    /// # Panics
    /// If the guest doesn't run.
    pub fn type_line(&self, guest: &str, line: &str) {
        let console = self.path(&format!("run/vms/{guest}/console.sock"));
        let mut console = UnixStream::connect(console).expect("the guest has a console");
        writeln!(console, "{line}").expect("it takes a line");
    }

    /// Sends a signal to the guest's keelson-vmm; its process id.
    ///
    /// # Panics
    /// If it doesn't run.
    pub fn signal_machine(&self, guest: &str, signal: Signal) -> u32 {
        // A guest may print before its status says that it runs.
        let id = wait_until("the guest's process", || {
            self.object("vm", guest)["status"]["processId"].as_u64()
        });
        let id = i32::try_from(id).expect("a process id");
        kill_process(Pid::from_raw(id).expect("not zero"), signal).expect("it is there");
        id.unsigned_abs()
    }

    /// The process ids of a program of this host.
    ///
    /// # Panics
    /// If /proc can't be read.
    pub fn processes(&self, program: &str) -> Vec<u32> {
        let folder = self.folder().to_string_lossy().into_owned();
        let line = |id: u32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).into_owned()
        };
        // A jail's inner process has its supervisor's command line.
        let is_inner = |id: u32| {
            let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            parent
                .and_then(|parent| parent.trim().parse().ok())
                .is_some_and(|parent| line(parent) == line(id))
        };
        fs::read_dir("/proc")
            .expect("/proc can be read")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|id: &u32| {
                let line = line(*id);
                let name = line.split('\0').next().unwrap_or_default().to_owned();
                name.ends_with(program) && line.contains(&folder) && !is_inner(*id)
            })
            .collect()
    }

    /// The network devices of the host.
    ///
    /// # Panics
    /// If they can't be listed.
    pub fn devices(&self) -> Vec<String> {
        let output = Command::new("ip")
            .args(["-o", "link"])
            .output()
            .expect("ip runs");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| Some(line.split(": ").nth(1)?.to_owned()))
            .collect()
    }
}

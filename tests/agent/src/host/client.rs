//! What is asked of a host: by the command line client, and by keelson-blk's.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use keelson_vmm_tests::{binary, wait_until};
use serde_json::Value;

use super::{Host, Said};

impl Host {
    /// Runs the client.
    ///
    /// # Panics
    /// If it is not built.
    pub fn keelson<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Said {
        let output = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("keelson runs");
        Said::of(&output)
    }

    /// Runs a command that goes on until it is killed, while `work` is done, and waits until it has
    /// printed all of `words` on one line.
    ///
    /// # Panics
    /// If the client can't be run, or does not print them in time.
    pub fn following<S: AsRef<OsStr>>(&self, arguments: &[S], work: impl FnOnce(), words: &[&str]) {
        let path = self.path("followed");
        let output = File::create(&path).expect("a file is made");
        let mut client = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .spawn()
            .expect("keelson runs");
        // It says nothing when it listens.
        std::thread::sleep(Duration::from_secs(1));
        work();
        wait_until("line with what the command should print", || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            text.lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
                .then_some(())
        });
        client.kill().expect("it runs");
        client.wait().expect("it ends");
    }

    /// Applies a manifest.
    ///
    /// # Panics
    /// If the client can't be run.
    pub fn apply(&self, manifest: &str) -> Said {
        let mut client = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(["apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("keelson runs");
        let mut input = client.stdin.take().expect("its input is a pipe");
        // It may refuse before it has read all.
        let _ = input.write_all(manifest.as_bytes());
        drop(input);
        Said::of(&client.wait_with_output().expect("keelson ends"))
    }

    /// An object as JSON.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn object(&self, kind: &str, name: &str) -> Value {
        let text = self.keelson(&["get", kind, name, "-o", "json"]).done();
        serde_json::from_str(&text).expect("the client prints JSON")
    }

    /// All objects, as their kinds and names in JSON.
    ///
    /// # Panics
    /// If the client fails.
    pub fn object_names(&self) -> Vec<String> {
        ["vm", "disk", "net", "sg"]
            .iter()
            .flat_map(|kind| {
                let text = self.keelson(&["get", kind, "-o", "json"]).done();
                let list: Value = serde_json::from_str(&text).expect("the client prints JSON");
                let items = list["items"].as_array().cloned().unwrap_or_default();
                items
                    .iter()
                    .map(|item| format!("{kind}/{}", item["metadata"]["name"]))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// Packets that a guest's first interface dropped in a direction, for a reason.
    ///
    /// # Panics
    /// If there are no counters.
    pub fn dropped(&self, guest: &str, direction: &str, reason: &str) -> u64 {
        let text = self
            .keelson(&["net", "counters", guest, "-o", "json"])
            .done();
        let counters: Value = serde_json::from_str(&text).expect("the client prints JSON");
        counters
            .pointer(&format!("/0/{direction}/dropped/{reason}/packets"))
            .and_then(Value::as_u64)
            .unwrap_or(0)
    }

    /// Runs keelson-blk on an image.
    ///
    /// # Panics
    /// If it is not built.
    pub fn blk(&self, arguments: &[&str], image: &Path) -> Said {
        let output = Command::new(binary("keelson-blk"))
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .output()
            .expect("keelson-blk runs");
        Said::of(&output)
    }

    /// Asks the keelson-blk of a guest's disk for what it serves.
    ///
    /// # Panics
    /// If it doesn't answer.
    pub fn served_disk(&self, guest: &str, disk: &str) -> Value {
        let socket = self.path(&format!("run/vms/{guest}/{disk}.disk.control"));
        let output = Command::new(binary("keelson-blk"))
            .args(["control", "--socket"])
            .arg(socket)
            .arg("list")
            .stdin(Stdio::null())
            .output()
            .expect("keelson-blk runs");
        let text = Said::of(&output).done();
        let listed: Value = serde_json::from_str(&text).expect("JSON");
        listed["disks"][0].clone()
    }
}

//! A root shell on the guest's console, used through the command line client.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::host::{Host, until};

/// A root shell on the guest's console.
#[derive(Debug)]
pub struct Console {
    client: Child,
    input: ChildStdin,
    output: Arc<Mutex<Vec<u8>>>,
    commands: u32,
}

impl Console {
    /// Connects to the console of the guest `web`.
    pub fn open(host: &Host) -> Result<Self> {
        let mut client = host
            .client()
            .args(["console", "web"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("run keelson console")?;
        let input = client.stdin.take().context("the client's input")?;
        let mut stdout = client.stdout.take().context("the client's output")?;
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&output);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(&buffer[..length]);
            }
        });
        Ok(Self {
            client,
            input,
            output,
            commands: 0,
        })
    }

    /// Runs a command in the guest; what it printed.
    ///
    /// # Errors
    /// What it printed, where its exit code is not 0.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.commands += 1;
        let number = self.commands;
        let before = self.text().len();
        // The shell echoes the line, but only its answer has the sum in it.
        writeln!(
            self.input,
            "echo begin-$(({number}+1000)); {command}; echo end-$(({number}+1000))-$?-"
        )
        .context("write to the console")?;
        let (begin, end) = (
            format!("begin-{}", number + 1000),
            format!("end-{}-", number + 1000),
        );
        let mut answer = String::new();
        let mut code = String::new();
        until(&format!("the guest answers {command:?}"), || {
            let text = self.text().get(before..).unwrap_or_default().to_owned();
            let Some((_, rest)) = text.split_once(&begin) else {
                return Ok(false);
            };
            let Some((printed, rest)) = rest.split_once(&end) else {
                return Ok(false);
            };
            let Some((exit, _)) = rest.split_once('-') else {
                return Ok(false);
            };
            printed.trim().clone_into(&mut answer);
            exit.clone_into(&mut code);
            Ok(true)
        })?;
        if code != "0" {
            bail!("in the guest, {command:?} exited with {code}: {answer}");
        }
        Ok(answer)
    }

    fn text(&self) -> String {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&output).into_owned()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // The client may have ended with the agent.
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

//! `keelson console`

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;

use clap::Args;
use futures::TryStreamExt;
use keelson_api::proto::{ConsoleInput, TerminalSize};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::Client;
use crate::failure::Failure;

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;
/// Reads of standard input that wait to be sent.
const PENDING_LIMIT: usize = 16;
const CHUNK: usize = 4096;

/// Use a guest's console; Ctrl-] leaves it. A guest with a virtio console follows the terminal's size.
#[derive(Args)]
pub struct Console {
    /// The guest.
    name: String,
}

impl Console {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let (sender, receiver) = mpsc::channel(PENDING_LIMIT);
        let first = ConsoleInput {
            name: self.name.clone(),
            size: terminal_size(),
            ..ConsoleInput::default()
        };
        sender.send(first).await.map_err(anyhow::Error::from)?;
        let output = client.guests.console(ReceiverStream::new(receiver)).await?;
        let mut output = output.into_inner();
        let terminal = RawTerminal::enter()?;
        if terminal.is_some() {
            eprint!("connected to {}; Ctrl-] leaves\r\n", self.name);
        }
        if terminal.is_some() {
            tokio::spawn(send_sizes(sender.clone()));
        }
        let reading = tokio::spawn(send_input(sender, terminal.is_some()));
        let left = async {
            // The end of piped input is not the end of the guest's answers.
            if reading.await.unwrap_or(false) {
                Ok(())
            } else {
                std::future::pending().await
            }
        };
        let printing = async {
            let mut stdout = std::io::stdout();
            while let Some(chunk) = output.try_next().await? {
                stdout.write_all(&chunk.data)?;
                stdout.flush()?;
            }
            Ok(())
        };
        let result = tokio::select! {
            result = printing => result,
            result = left => result,
        };
        drop(terminal);
        eprintln!();
        result
    }
}

/// Sends standard input; whether the person asked to leave.
async fn send_input(sender: mpsc::Sender<ConsoleInput>, escapes: bool) -> bool {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => {
                // Keeps the stream to the agent open.
                sender.closed().await;
                return false;
            }
            Ok(length) => length,
        };
        let data = &buffer[..length];
        let escape = data.iter().position(|byte| escapes && *byte == ESCAPE);
        let data = data[..escape.unwrap_or(length)].to_vec();
        if sender
            .send(ConsoleInput {
                data,
                ..ConsoleInput::default()
            })
            .await
            .is_err()
        {
            return false;
        }
        if escape.is_some() {
            return true;
        }
    }
}

/// Sends the terminal's size each time that it changes (SIGWINCH).
async fn send_sizes(sender: mpsc::Sender<ConsoleInput>) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    loop {
        tokio::select! {
            change = changes.recv() => if change.is_none() { return },
            () = sender.closed() => return,
        }
        let message = ConsoleInput {
            size: terminal_size(),
            ..ConsoleInput::default()
        };
        if message.size.is_some() && sender.send(message).await.is_err() {
            return;
        }
    }
}

/// The size of the terminal that is standard input, if it is one that knows its size.
fn terminal_size() -> Option<TerminalSize> {
    let size = tcgetwinsize(std::io::stdin().as_fd()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| TerminalSize {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    })
}

/// Standard input in raw mode, until this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` where standard input is no terminal.
    fn enter() -> Result<Option<Self>, Failure> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).map_err(std::io::Error::from)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // There is nobody left to tell of an error.
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}

//! The destination's side: a thread that takes the guest's memory.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::Kvm;

use super::stream::{Frame, Receiver, Sender, StreamError};
use super::{Hello, MachineImage, MigrationError};
use crate::config::GuestConfig;
use crate::cpuid;
use crate::isolation::seccomp::{self, Mode, Thread};
use crate::machine::check_fits;
use crate::memory::{GuestMemory, Ram};
use crate::snapshot::memory_file;

/// A guest that is coming. Dropped, it is given up.
pub(crate) struct Arrival {
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// All of a guest, from which its machine can be built.
pub(crate) struct Arrived {
    /// Its memory.
    pub(crate) memory: GuestMemory,
    /// The rest.
    pub(crate) image: MachineImage,
    sender: Sender<UnixStream>,
}

impl Arrived {
    /// Splits off the half of the connection that says what became of it.
    pub(crate) fn into_parts(self) -> (GuestMemory, MachineImage, Answer) {
        (self.memory, self.image, Answer(self.sender))
    }
}

/// What the source still waits for. As long as it isn't dropped the source knows that this side lives.
pub(crate) struct Answer(Sender<UnixStream>);

impl Answer {
    /// The guest could go on here.
    pub(crate) fn loaded(&mut self) -> Result<(), MigrationError> {
        Ok(self.0.send(&Frame::Loaded)?)
    }

    /// It can't.
    pub(crate) fn failed(&mut self, reason: &str) {
        // The source sees the end of the connection, if it doesn't hear why.
        let _ = self.0.send(&Frame::Failed(reason.to_owned()));
    }
}

impl Arrival {
    /// Begins to take a guest over `stream` into `memory`, which is zero.
    pub(crate) fn start(
        stream: UnixStream,
        kvm: Arc<Kvm>,
        config: GuestConfig,
        memory: GuestMemory,
        report: impl FnOnce(Result<Arrived, MigrationError>) + Send + 'static,
        mode: Mode,
    ) -> io::Result<Self> {
        let own = stream.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                let result = seccomp::apply(Thread::Migration, mode)
                    .map_err(|e| MigrationError::Build(e.to_string()))
                    .and_then(|()| receive(own, &kvm, &config, memory));
                report(result);
            })?;
        Ok(Self {
            stream,
            thread: Some(thread),
        })
    }

    /// It has said what became of it; the connection is in what it said.
    pub(crate) fn finish(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that takes the guest panicked");
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // Fails only if the connection has ended.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        self.join();
    }
}

fn receive(
    stream: UnixStream,
    kvm: &Kvm,
    config: &GuestConfig,
    memory: GuestMemory,
) -> Result<Arrived, MigrationError> {
    let input = stream
        .try_clone()
        .map_err(MigrationError::os("take the connection"))?;
    let mut sender = Sender::start(stream)?;
    let taken = Receiver::start(io::BufReader::with_capacity(1 << 20, input))
        .map_err(MigrationError::from)
        .and_then(|mut receiver| {
            greet(&mut receiver, kvm, config)?;
            sender.send(&Frame::Ready)?;
            take(&mut receiver, config, &memory)
        });
    match taken {
        Ok(image) => Ok(Arrived {
            memory,
            image,
            sender,
        }),
        Err(e) => {
            Answer(sender).failed(&e.to_string());
            Err(e)
        }
    }
}

/// Hears what guest it is, and checks that it can run here.
fn greet<R: io::Read>(
    receiver: &mut Receiver<R>,
    kvm: &Kvm,
    config: &GuestConfig,
) -> Result<(), MigrationError> {
    let hello = match receiver.receive()? {
        Frame::Hello(bytes) => Hello::decode(&bytes).map_err(StreamError::from)?,
        Frame::Failed(reason) => return Err(MigrationError::Refused(reason)),
        other => {
            return Err(MigrationError::OutOfOrder {
                found: other.name(),
                expected: "a greeting",
            });
        }
    };
    check_fits(config, &hello.config()?)?;
    cpuid::check_host(&cpuid::offered(kvm)?, &hello.cpuid)?;
    tracing::info!(program = hello.program, "a guest is coming");
    Ok(())
}

/// Takes memory until the state comes.
fn take<R: io::Read>(
    receiver: &mut Receiver<R>,
    config: &GuestConfig,
    memory: &Ram,
) -> Result<MachineImage, MigrationError> {
    loop {
        match receiver.receive()? {
            Frame::Pages { first, bytes } => {
                memory_file::put(memory, first, &bytes).map_err(unplaced)?;
            }
            Frame::Zeros(range) => memory_file::put_zeros(memory, range).map_err(unplaced)?,
            Frame::State(bytes) => {
                return Ok(MachineImage::decode(&bytes, config).map_err(StreamError::from)?);
            }
            Frame::Failed(reason) => return Err(MigrationError::Refused(reason)),
            other => {
                return Err(MigrationError::OutOfOrder {
                    found: other.name(),
                    expected: "memory",
                });
            }
        }
    }
}

const fn unplaced(source: io::Error) -> MigrationError {
    MigrationError::Os {
        step: "put memory into its place",
        source,
    }
}

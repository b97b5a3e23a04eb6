//! The thread that does what requests must not wait for.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::time::Duration;

use keelson_member::MemberError;
use keelson_member::disk::Disk;
use keelson_member::keyspace::Keyspace;
use keelson_member::replica::{Input, Maintenance, Wanted};

use crate::driver::Told;
use crate::node::Node;

/// Of the maintenance thread, as `nice` counts.
const NICE: i32 = 10;
/// How often the end of a flush is looked for.
const POLL: Duration = Duration::from_millis(5);

/// Wakes the thread.
pub struct Handle(SyncSender<Wanted>);

impl Handle {
    /// There may be something to do.
    pub fn wake(&self, wanted: Wanted) {
        // If it is at work already, it is told again at the next tick.
        let _ = self.0.try_send(wanted);
    }
}

/// Starts the thread, which tells the member's thread what it did.
pub fn start(
    keyspace: Arc<Keyspace>,
    disk: Arc<dyn Disk>,
    inputs: Sender<Told>,
) -> std::io::Result<Handle> {
    let (wake, woken) = sync_channel(1);
    std::thread::Builder::new()
        .name("maintenance".into())
        .spawn(move || {
            be_modest();
            if let Err(error) = run(&keyspace, &*disk, &inputs, &woken) {
                let _ = inputs.send(Told::Input(Input::Failed(error)));
            }
        })?;
    Ok(Handle(wake))
}

/// Lets the threads that answer requests go first: a flush has time, a client waits. If flushes fall
/// too far behind for it, requests are refused.
fn be_modest() {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), NICE) {
        tracing::debug!(%error, "the maintenance thread keeps its priority");
    }
}

/// Makes everything that is applied durable in the storage engine. Slow: not for async code.
pub fn flush_now(node: &Node) -> Result<(), MemberError> {
    loop {
        if let Some(flush) = node.keyspace().begin_flush() {
            if let Some(metadata) = node.keyspace().flush(flush)? {
                node.tell(Input::Flushed(Box::new(metadata)));
                return Ok(());
            }
        } else {
            // The flush that is under way began before what is wanted.
            std::thread::sleep(POLL);
        }
    }
}

fn run(
    keyspace: &Keyspace,
    disk: &dyn Disk,
    inputs: &Sender<Told>,
    woken: &Receiver<Wanted>,
) -> Result<(), MemberError> {
    let mut maintenance = Maintenance::new(std::process::id());
    while let Ok(wanted) = woken.recv() {
        for job in maintenance.plan(wanted, keyspace) {
            if let Some(done) = maintenance.run(job, keyspace, disk)? {
                let _ = inputs.send(Told::Input(done));
            }
        }
    }
    Ok(())
}

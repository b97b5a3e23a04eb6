//! The thread that does what requests must not wait for: flushes, removal of compacted versions,
//! files for the log.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};

use keelson_member::MemberError;
use keelson_member::disk::Disk;
use keelson_member::keyspace::Keyspace;
use keelson_member::log::prepare_spare;

use crate::node::Input;

/// Wakes the thread.
pub struct Handle(SyncSender<usize>);

impl Handle {
    /// There may be something to do; the log lacks `spares` files.
    pub fn wake(&self, spares: usize) {
        // If it is at work already, it is told again at the next tick.
        let _ = self.0.try_send(spares);
    }
}

/// Starts the thread, which tells the member's thread what it did.
pub fn start(
    keyspace: Arc<Keyspace>,
    disk: Arc<dyn Disk>,
    inputs: Sender<Input>,
) -> std::io::Result<Handle> {
    let (wake, woken) = sync_channel(1);
    std::thread::Builder::new()
        .name("maintenance".into())
        .spawn(move || {
            if let Err(error) = run(&keyspace, &*disk, &inputs, &woken) {
                let _ = inputs.send(Input::Failed(error));
            }
        })?;
    Ok(Handle(wake))
}

fn run(
    keyspace: &Keyspace,
    disk: &dyn Disk,
    inputs: &Sender<Input>,
    woken: &Receiver<usize>,
) -> Result<(), MemberError> {
    let mut prepared = 0_u64;
    let mut cleared = 0;
    while let Ok(spares) = woken.recv() {
        let (_, compacted) = keyspace.revisions();
        let clear = compacted > cleared;
        if (keyspace.wants_flush() || (clear && keyspace.has_unflushed(compacted)))
            && let Some(flush) = keyspace.begin_flush()
        {
            let index = keyspace.flush(&flush)?;
            let _ = inputs.send(Input::Flushed(index));
        }
        for _ in 0..spares {
            prepared += 1;
            let number = (u64::from(std::process::id()) << 32) | prepared;
            let name = prepare_spare(disk, number)?;
            let _ = inputs.send(Input::Spare(name));
        }
        if clear {
            while keyspace.clear_compacted()? {}
            cleared = compacted;
        }
    }
    Ok(())
}

//! What carries a migration's stream from one process to the other, as an agent does, and breaks it
//! where a test wants that.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

/// What becomes of the bytes that go to the destination.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// They arrive.
    Whole,
    /// The connection ends after so many.
    CutAfter(u64),
    /// This one has a bit flipped.
    Flip(u64),
}

/// A connection between two streams. Dropped, it ends.
pub struct Relay {
    ends: [UnixStream; 2],
    threads: Vec<JoinHandle<()>>,
    passed: Arc<AtomicU64>,
}

impl Relay {
    /// Carries bytes both ways until one side ends.
    ///
    /// # Panics
    /// If there are no threads or descriptors left.
    pub fn between(source: UnixStream, destination: UnixStream, fate: Fate) -> Self {
        let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
        let ways = [
            (clone(&source), clone(&destination), fate),
            (clone(&destination), clone(&source), Fate::Whole),
        ];
        let passed = Arc::new(AtomicU64::new(0));
        let threads = ways.into_iter().enumerate().map(|(way, (from, to, fate))| {
            let passed = (way == 0).then(|| Arc::clone(&passed));
            std::thread::spawn(move || carry(from, to, fate, passed.as_deref()))
        });
        Self {
            threads: threads.collect(),
            ends: [source, destination],
            passed,
        }
    }

    /// How many bytes went to the destination.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for end in &self.ends {
            // It may have ended.
            let _ = end.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: UnixStream, mut to: UnixStream, fate: Fate, passed: Option<&AtomicU64>) {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0_u64;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let mut length = length as u64;
        let mut cut = false;
        match fate {
            Fate::CutAfter(limit) if at + length >= limit => {
                length = limit.saturating_sub(at);
                cut = true;
            }
            Fate::Flip(byte) if (at..at + length).contains(&byte) => {
                buffer[usize::try_from(byte - at).expect("within the buffer")] ^= 0x10;
            }
            _ => {}
        }
        let bytes = &buffer[..usize::try_from(length).expect("within the buffer")];
        if to.write_all(bytes).is_err() || cut {
            break;
        }
        at += length;
        if let Some(passed) = passed {
            passed.store(at, Ordering::Relaxed);
        }
    }
    for end in [&from, &to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}

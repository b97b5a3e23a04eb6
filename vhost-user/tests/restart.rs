//! The backend is killed or replaced at any moment under load: the guest sees a pause and no
//! error, no request is lost or handed back twice, and what was acknowledged is on the disk.
//!
//! `KEELSON_KILLS=5000 cargo nextest run -p keelson-blk --test restart killed` kills that often, a raw
//! image's backend and an overlay's.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::time::{Duration, Instant};

use harness::steady_guest::{BLOCK, SteadyGuest};
use harness::{Backend, PATIENCE, Scene, pattern};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
/// Of the usual disk.
const BLOCKS: u64 = 512;
/// Of an overlay: 1,024 stripes, so that few blocks are where one was written before.
const OVERLAY_BLOCKS: u64 = 16 << 10;

/// A guest's view of a disk: which version of each block it was told is there.
struct Load {
    guest: SteadyGuest,
    disk: u64,
    /// What is there at first: zeroes, or a base's blocks.
    base: bool,
    acknowledged: Vec<u64>,
    /// What each slot does: the block, and the version for a write.
    doing: Vec<Option<(u64, Option<u64>)>>,
    version: u64,
    random: u64,
    done: u64,
}

impl Load {
    fn new(disk: u64) -> Self {
        Self::of(disk, BLOCKS, false)
    }

    fn of(disk: u64, blocks: u64, base: bool) -> Self {
        Self {
            guest: SteadyGuest::new(),
            disk,
            base,
            acknowledged: vec![0; usize::try_from(blocks).unwrap()],
            doing: vec![None; 64],
            version: 0,
            random: 0x9e37_79b9_7f4a_7c15 ^ disk,
            done: 0,
        }
    }

    fn blocks(&self) -> u64 {
        self.acknowledged.len() as u64
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % below
    }

    // A block says which disk, place and version it is of, in every byte.
    fn content(&self, block: u64, version: u64) -> Vec<u8> {
        match version {
            0 if !self.base => vec![0; BLOCK],
            _ => pattern(self.disk << 56 | block << 40 | version, BLOCK),
        }
    }

    /// Takes what is done and fills the queue up again.
    fn turn(&mut self) {
        for (slot, status, data) in self.guest.completed() {
            self.check(slot, status, &data);
        }
        while let Some(slot) = self.guest.free_slot() {
            self.start(slot);
        }
        self.guest.wait();
    }

    fn check(&mut self, slot: usize, status: u8, data: &[u8]) {
        assert_eq!(status, 0, "the guest saw an error");
        self.done += 1;
        match self.doing[slot].take() {
            Some((block, Some(version))) => {
                self.acknowledged[usize::try_from(block).unwrap()] = version;
            }
            Some((block, None)) => {
                let version = self.acknowledged[usize::try_from(block).unwrap()];
                assert!(
                    *data == self.content(block, version),
                    "block {block} is wrong"
                );
            }
            None => {}
        }
    }

    fn start(&mut self, slot: usize) {
        if self.random(16) == 0 {
            self.guest.submit(slot, FLUSH, 0, Err(0));
            return;
        }
        // One request on a block at a time, so that it is known what has to be there.
        let block = loop {
            let block = self.random(self.blocks());
            if self
                .doing
                .iter()
                .flatten()
                .all(|(other, _)| *other != block)
            {
                break block;
            }
        };
        let sector = block * (BLOCK as u64 / 512);
        if self.random(3) == 0 {
            self.doing[slot] = Some((block, None));
            self.guest.submit(slot, READ, sector, Err(BLOCK));
        } else {
            self.version += 1;
            self.doing[slot] = Some((block, Some(self.version)));
            let bytes = self.content(block, self.version);
            self.guest.submit(slot, WRITE, sector, Ok(&bytes));
        }
    }

    fn run_for(&mut self, duration: Duration) {
        let end = Instant::now() + duration;
        while Instant::now() < end {
            self.turn();
        }
    }

    fn finish(&mut self, scene: &Scene) {
        self.settle();
        self.compare(|block| scene.image_bytes(block * BLOCK as u64, BLOCK));
    }

    fn settle(&mut self) {
        for (slot, status, data) in self.guest.finish() {
            self.check(slot, status, &data);
        }
    }

    fn compare(&self, read: impl Fn(u64) -> Vec<u8>) {
        for (block, version) in (0..).zip(&self.acknowledged) {
            let expected = self.content(block, *version);
            assert!(read(block) == expected, "block {block} is wrong");
        }
    }
}

fn kills(usual: u64) -> u64 {
    let wanted = std::env::var("KEELSON_KILLS").ok();
    wanted.map_or(usual, |text| text.parse().expect("a number of kills"))
}

#[test]
fn the_guest_sees_no_error_when_the_backend_is_killed_at_any_moment() {
    let scene = Scene::new(BLOCKS * BLOCK as u64);
    let mut load = Load::new(1);
    let mut replayed = 0;
    for kill in 0..kills(300) {
        let backend = scene.start(&["--log-level", "warn"]);
        load.guest.connect(&scene.socket).unwrap();
        if kill % 8 == 0 {
            // Killed again before it has caught up.
            backend.kill();
            continue;
        }
        let microseconds = load.random(6000);
        load.run_for(Duration::from_micros(microseconds));
        backend.kill();
        replayed += load.guest.busy();
    }
    let backend = scene.start(&[]);
    load.guest.connect(&scene.socket).unwrap();
    load.finish(&scene);
    assert!(
        load.done > 300 && replayed > 300,
        "{} {replayed}",
        load.done
    );
    load.guest.disconnect();
    assert_eq!(backend.terminate().code(), Some(0));
    println!(
        "{} kills, {} requests done, {replayed} in flight at kills, {BLOCKS} blocks checked",
        kills(300),
        load.done
    );
}

#[test]
fn nor_when_it_is_killed_while_it_serves_an_overlay() {
    const SNAPSHOTS: u64 = 24;
    let scene = Scene::new(OVERLAY_BLOCKS * BLOCK as u64);
    let mut load = Load::of(5, OVERLAY_BLOCKS, true);
    let blocks = (0..OVERLAY_BLOCKS).map(|block| load.content(block, 0));
    std::fs::write(&scene.image, blocks.collect::<Vec<_>>().concat()).unwrap();
    let overlay = scene.directory.path().join("overlay.img");
    let image = |arguments: &[&std::ffi::OsStr]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
        let output = command.arg("image").args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    };
    let base = scene.image.as_os_str();
    image(&[
        "create".as_ref(),
        "--overlay-of".as_ref(),
        base,
        overlay.as_os_str(),
    ]);
    let start = || {
        let mut command = harness::command(&overlay, &scene.socket);
        command.args(["--format", "overlay", "--log-level", "warn"]);
        Backend::start(command)
    };
    let (kills, mut replayed) = (kills(150), 0);
    for kill in 0..kills {
        if kill % (kills / SNAPSHOTS).max(1) == 0 && kill / (kills / SNAPSHOTS).max(1) < SNAPSHOTS {
            // Once more, all stripes have to be brought up; and what the killed one had not
            // flushed belongs to the snapshot.
            let name = format!("at-{kill}");
            image(&["snapshot".as_ref(), overlay.as_os_str(), name.as_ref()]);
        }
        let backend = start();
        load.guest.connect(&scene.socket).unwrap();
        if kill % 8 == 0 {
            backend.kill();
            continue;
        }
        let microseconds = load.random(6000);
        load.run_for(Duration::from_micros(microseconds));
        backend.kill();
        replayed += load.guest.busy();
    }
    let backend = start();
    load.guest.connect(&scene.socket).unwrap();
    load.settle();
    assert!(
        load.done > 100 && replayed > 100,
        "{} {replayed}",
        load.done
    );
    load.guest.disconnect();
    assert_eq!(backend.terminate().code(), Some(0));
    image(&["check".as_ref(), overlay.as_os_str()]);
    let whole = scene.directory.path().join("whole.img");
    image(&["export".as_ref(), overlay.as_os_str(), whole.as_os_str()]);
    let whole = std::fs::read(whole).unwrap();
    load.compare(|block| {
        let place = usize::try_from(block).unwrap() * BLOCK;
        whole[place..place + BLOCK].to_vec()
    });
    println!(
        "{kills} kills, {} requests done, {replayed} in flight at kills, {OVERLAY_BLOCKS} blocks checked",
        load.done
    );
}

#[test]
fn a_backend_that_is_told_to_stop_hands_over_to_the_next_under_load() {
    let scene = Scene::new(BLOCKS * BLOCK as u64);
    let mut load = Load::new(2);
    for _ in 0..20 {
        let backend = scene.start(&["--log-level", "warn"]);
        load.guest.connect(&scene.socket).unwrap();
        load.run_for(Duration::from_millis(20));
        // It finishes what it has, while the guest goes on.
        let stopped = std::thread::spawn(move || backend.terminate().code());
        while !stopped.is_finished() {
            load.turn();
        }
        assert_eq!(stopped.join().unwrap(), Some(0));
    }
    let _backend = scene.start(&[]);
    load.guest.connect(&scene.socket).unwrap();
    load.finish(&scene);
    assert!(load.done > 1000, "{}", load.done);
}

#[test]
fn a_stopped_queue_has_nothing_in_flight_and_goes_on_elsewhere() {
    let scene = Scene::new(BLOCKS * BLOCK as u64);
    let backend = scene.start(&[]);
    let mut load = Load::new(3);
    for _ in 0..10 {
        load.guest.connect(&scene.socket).unwrap();
        load.run_for(Duration::from_millis(5));
        load.guest.stop_queue();
        for (slot, status, data) in load.guest.completed() {
            load.check(slot, status, &data);
        }
    }
    load.guest.connect(&scene.socket).unwrap();
    load.finish(&scene);
    load.guest.disconnect();
    assert_eq!(backend.terminate().code(), Some(0));
}

// The dead process's writes may still be on their way to the disk when the next one is there; if
// it began at once, an old write could land on a newer one.
#[test]
fn the_next_backend_waits_for_the_writes_of_a_killed_one() {
    let scene = Scene::new(BLOCKS * BLOCK as u64);
    let mut load = Load::new(4);
    for _ in 0..20 {
        let backend = scene.start(&["--log-level", "warn"]);
        load.guest.connect(&scene.socket).unwrap();
        load.run_for(Duration::from_millis(3));
        let killed = Instant::now();
        backend.kill();
        let next = scene.start(&["--log-level", "warn"]);
        load.guest.connect(&scene.socket).unwrap();
        load.run_for(Duration::from_millis(3));
        assert!(killed.elapsed() < PATIENCE);
        drop(next);
    }
    let _backend: Backend = scene.start(&[]);
    load.guest.connect(&scene.socket).unwrap();
    load.finish(&scene);
}

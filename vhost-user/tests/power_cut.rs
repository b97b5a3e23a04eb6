//! Power cuts, errors and slowness, from a layer that has a write cache of its own: what was
//! written and not flushed may be there or not, sector by sector, after a cut.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use harness::driver::{Driver, FLUSH, USUAL};
use harness::{Scene, pattern};
use keelson_blk::disk::Disk;
use keelson_blk::image::BlockSizes;
use keelson_blk::layer::{
    BlockDevice, ChannelContext, IoChannel, IoCompletion, IoRequest, Operation, Properties,
    RingOperations, Token, Waker,
};
use keelson_blk::server::{DiskServer, ServerOptions};
use keelson_blk::worker::{WorkerOptions, WorkerPool};

const SECTOR: usize = 512;
const BLOCK: usize = 4096;
const BYTES: usize = 1 << 20;

/// A disk with a write cache, which can lose power, fail and be slow.
#[derive(Debug, Default)]
struct Medium {
    durable: Mutex<Vec<u8>>,
    /// Sectors that were written and not flushed.
    cached: Mutex<BTreeMap<usize, Vec<u8>>>,
    /// An errno for writes and flushes, or 0.
    failing: AtomicI32,
    stalled: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

#[derive(Clone, Debug)]
struct CachedDevice(Arc<Medium>);

impl CachedDevice {
    fn new() -> Self {
        let medium = Medium::default();
        *medium.durable.lock().unwrap() = vec![0; BYTES];
        Self(Arc::new(medium))
    }

    /// What is there after a cut: each unflushed sector or not.
    fn cut(&self, mut random: u64) -> Vec<u8> {
        let mut bytes = self.0.durable.lock().unwrap().clone();
        for (sector, content) in std::mem::take(&mut *self.0.cached.lock().unwrap()) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random & 1 == 0 {
                bytes[sector * SECTOR..][..SECTOR].copy_from_slice(&content);
            }
        }
        bytes
    }

    fn stall(&self, stalled: bool) {
        self.0.stalled.store(stalled, Ordering::SeqCst);
        for waker in &*self.0.wakers.lock().unwrap() {
            waker.wake();
        }
    }
}

impl Medium {
    fn perform(&self, request: &IoRequest) -> Result<(), i32> {
        let failing = self.failing.load(Ordering::SeqCst);
        let mut durable = self.durable.lock().unwrap();
        let mut cached = self.cached.lock().unwrap();
        let first = usize::try_from(request.offset).unwrap() / SECTOR;
        let sectors = usize::try_from(request.len).unwrap() / SECTOR;
        match request.operation {
            Operation::Read => {
                for index in 0..sectors {
                    let sector = first + index;
                    let content = cached
                        .get(&sector)
                        .map_or(&durable[sector * SECTOR..][..SECTOR], |content| {
                            content.as_slice()
                        });
                    request.buffers.copy_from((index * SECTOR) as u64, content);
                }
            }
            _ if failing != 0 => return Err(failing),
            Operation::Flush => {
                for (sector, content) in std::mem::take(&mut *cached) {
                    durable[sector * SECTOR..][..SECTOR].copy_from_slice(&content);
                }
            }
            Operation::Write | Operation::WriteZeroes { .. } => {
                for index in 0..sectors {
                    let mut content = vec![0; SECTOR];
                    if request.operation == Operation::Write {
                        let place = (index * SECTOR) as u64;
                        request.buffers.copy_to(place, &mut content);
                    }
                    let sector = first + index;
                    if request.durable {
                        cached.remove(&sector);
                        durable[sector * SECTOR..][..SECTOR].copy_from_slice(&content);
                    } else {
                        cached.insert(sector, content);
                    }
                }
            }
            Operation::Discard => {}
        }
        Ok(())
    }
}

impl BlockDevice for CachedDevice {
    fn properties(&self) -> Properties {
        Properties {
            bytes: BYTES as u64,
            block_sizes: BlockSizes {
                logical: 512,
                physical: 512,
                optimal: 0,
            },
            read_only: false,
            alignment: 1,
            discard: true,
        }
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        self.0.wakers.lock().unwrap().push(context.waker());
        Ok(Box::new(CachedChannel {
            medium: Arc::clone(&self.0),
            waiting: VecDeque::new(),
            completed: Vec::new(),
        }))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct CachedChannel {
    medium: Arc<Medium>,
    waiting: VecDeque<IoRequest>,
    completed: Vec<IoCompletion>,
}

impl CachedChannel {
    fn go_on(&mut self) {
        while !self.medium.stalled.load(Ordering::SeqCst) {
            let Some(request) = self.waiting.pop_front() else {
                return;
            };
            self.completed.push(IoCompletion {
                tag: request.tag,
                result: self.medium.perform(&request),
                buffers: request.buffers,
            });
        }
    }
}

impl IoChannel for CachedChannel {
    fn submit(&mut self, request: IoRequest, _ring: &mut RingOperations) {
        self.waiting.push_back(request);
        self.go_on();
    }

    fn complete(&mut self, _token: Token, _result: i32, _ring: &mut RingOperations) -> bool {
        false
    }

    // The last one first: the order is nobody's to rely on.
    fn take_completion(&mut self) -> Option<IoCompletion> {
        self.completed.pop()
    }

    fn wake(&mut self, _now: Instant, _ring: &mut RingOperations) {
        self.go_on();
    }
}

fn serve(scene: &Scene, device: &CachedDevice, workers: &Arc<WorkerPool>) -> DiskServer {
    let disk = Disk::new(Arc::new(device.clone()), [0; 20]);
    let options = ServerOptions {
        socket: scene.socket.clone(),
        queues: 1,
        queue_size: 1024,
    };
    DiskServer::start(options, Arc::new(disk), Arc::clone(workers), || {}).unwrap()
}

fn workers(threads: usize) -> Arc<WorkerPool> {
    WorkerPool::new(WorkerOptions {
        threads: Some(threads),
        ..WorkerOptions::default()
    })
}

fn content(block: usize, version: u64) -> Vec<u8> {
    match version {
        0 => vec![0; BLOCK],
        _ => pattern((block as u64) << 32 | version, BLOCK),
    }
}

#[test]
fn what_was_flushed_survives_a_power_cut_and_nothing_is_torn_below_the_sector() {
    let workers = workers(1);
    let mut lost = 0;
    for cut in 1..60_u64 {
        let scene = Scene::new(BYTES as u64);
        let device = CachedDevice::new();
        let server = serve(&scene, &device, &workers);
        let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
        let (mut flushed, mut version) = ([0_u64; 32], 0);
        for _ in 0..cut % 5 {
            version += 1;
            for block in 0..16 {
                let block = (block * 7 + usize::try_from(cut).unwrap()) % 32;
                assert_eq!(
                    driver.write((block * BLOCK) as u64, &content(block, version)),
                    0
                );
                flushed[block] = version;
            }
            assert_eq!(driver.flush(), 0);
        }
        let mut maybe = flushed;
        for (block, maybe) in maybe.iter_mut().enumerate().take(16) {
            assert_eq!(
                driver.write((block * BLOCK) as u64, &content(block, 1000)),
                0
            );
            *maybe = 1000;
        }
        let bytes = device.cut(cut.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for block in 0..32 {
            let found = &bytes[block * BLOCK..][..BLOCK];
            let (old, new) = (content(block, flushed[block]), content(block, maybe[block]));
            for sector in (0..BLOCK).step_by(SECTOR) {
                let part = sector..sector + SECTOR;
                let is = |version: &[u8]| found[part.clone()] == version[part.clone()];
                assert!(is(&old) || is(&new), "block {block} lost what was flushed");
                lost += u32::from(!is(&new));
            }
        }
        drop(driver);
        server.stop().unwrap();
    }
    // The cuts did take something.
    assert!(lost > 1000, "{lost}");
}

#[test]
fn without_a_flush_in_the_driver_every_write_survives_a_power_cut() {
    let (scene, device) = (Scene::new(BYTES as u64), CachedDevice::new());
    let server = serve(&scene, &device, &workers(1));
    let mut driver = Driver::connect(scene.socket_path(), USUAL & !FLUSH, 1, 1 << 20);
    for block in 0..64 {
        assert_eq!(driver.write((block * BLOCK) as u64, &content(block, 1)), 0);
    }
    let bytes = device.cut(1);
    for block in 0..64 {
        assert!(bytes[block * BLOCK..][..BLOCK] == content(block, 1));
    }
    drop(driver);
    server.stop().unwrap();
}

#[test]
fn errors_and_full_disks_are_errors_until_they_are_over() {
    let (scene, device) = (Scene::new(BYTES as u64), CachedDevice::new());
    let _server = serve(&scene, &device, &workers(1));
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    for errno in [libc::EIO, libc::ENOSPC, libc::ETIMEDOUT] {
        assert_eq!(driver.write(0, &[1; 512]), 0);
        device.0.failing.store(errno, Ordering::SeqCst);
        assert_eq!(driver.write(0, &[2; 512]), -libc::EIO);
        assert_eq!(driver.flush(), -libc::EIO);
        assert_eq!(driver.read(0, 512).unwrap(), [1; 512]);
        device.0.failing.store(0, Ordering::SeqCst);
        assert_eq!(driver.write(0, &[3; 512]), 0);
        assert_eq!(driver.flush(), 0);
    }
}

#[test]
fn a_disk_that_stands_still_holds_up_nobody_else_on_its_worker() {
    let workers = workers(1);
    let (slow_scene, slow) = (Scene::new(BYTES as u64), CachedDevice::new());
    let (scene, device) = (Scene::new(BYTES as u64), CachedDevice::new());
    let _slow_server = serve(&slow_scene, &slow, &workers);
    let _server = serve(&scene, &device, &workers);
    let mut slow_driver = Driver::connect(slow_scene.socket_path(), USUAL, 1, 1 << 20);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    slow.stall(true);
    for slot in 0..64 {
        slow_driver.queue_write(0, slot * 4096, 0, 4096, slot);
    }
    slow_driver.kick(0);
    for block in 0..64 {
        assert_eq!(driver.write(block * 4096, &[1; 4096]), 0);
    }
    slow.stall(false);
    let done = slow_driver.finish(0, 64);
    assert!(done.iter().all(|done| done.ret == 0));
}

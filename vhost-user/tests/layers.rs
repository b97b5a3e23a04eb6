//! The layers of a disk on a real ring: overlays, encryption, limits, and all of them stacked.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "in tests"
)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::IoUring;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::layer::crypt::CryptDevice;
use keelson_blk::layer::file::FileDevice;
use keelson_blk::layer::limit::LimitDevice;
use keelson_blk::layer::overlay::OverlayDevice;
use keelson_blk::layer::ring::{FileTable, MAX_FILES};
use keelson_blk::layer::{
    BlockDevice, Buffers, ChannelContext, IoChannel, IoRequest, Operation, RingOperations, Token,
    Waker,
};
use keelson_blk::overlay::files::{self, CreateOptions, Format, NewBase};
use keelson_blk::overlay::snapshot;
use keelson_blk::rate_limit::{Limiter, Limits, Rate};
use keelson_blk::sector_cipher::SectorCipher;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tempfile::TempDir;

const STRIPE: usize = 64 << 10;

/// A queue without a guest: what a worker does with a channel.
struct Queue {
    // Before the ring's memory users go, the channel has to be idle; `finish` sees to it.
    channel: Box<dyn IoChannel>,
    operations: RingOperations,
    ring: IoUring,
    event: Arc<std::os::fd::OwnedFd>,
    results: HashMap<u64, (Result<(), i32>, Buffers)>,
    in_flight: usize,
    next_tag: u64,
}

impl Queue {
    fn open(device: &dyn BlockDevice) -> Self {
        let ring = IoUring::new(256).unwrap();
        ring.submitter().register_files_sparse(MAX_FILES).unwrap();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = Arc::new(eventfd(0, flags).unwrap());
        let waker = Waker::new(Arc::clone(&event));
        let mut table = FileTable::default();
        let channel = {
            let submitter = ring.submitter();
            let mut context = ChannelContext::new(&mut table, Some(&submitter), &waker);
            device.open_channel(&mut context).unwrap()
        };
        Self {
            channel,
            operations: RingOperations::new(0),
            ring,
            event,
            results: HashMap::new(),
            in_flight: 0,
            next_tag: 0,
        }
    }

    fn submit(&mut self, operation: Operation, offset: usize, buffers: Buffers, len: usize) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        let request = IoRequest {
            tag,
            operation,
            offset: offset as u64,
            len: len as u64,
            durable: false,
            buffers,
        };
        self.channel.submit(request, &mut self.operations);
        self.in_flight += 1;
        self.push();
        tag
    }

    fn push(&mut self) {
        for entry in self.operations.entries() {
            // SAFETY: the channels keep what the entries point to until their completion.
            unsafe { self.ring.submission().push(entry) }.unwrap();
        }
        self.operations.clear();
        self.ring.submit().unwrap();
    }

    /// Waits until nothing is in flight.
    fn finish(&mut self) {
        let deadline = Instant::now() + Duration::from_mins(2);
        loop {
            while let Some(done) = self.channel.take_completion() {
                self.results.insert(done.tag, (done.result, done.buffers));
                self.in_flight -= 1;
            }
            self.push();
            if self.in_flight == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "requests never end");
            let completions: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (data, result) in &completions {
                let token = Token::from_user_data(*data);
                assert!(self.channel.complete(token, *result, &mut self.operations));
            }
            if completions.is_empty() {
                self.wait();
            }
            self.channel.wake(Instant::now(), &mut self.operations);
        }
    }

    // The worker waits in its ring; here a short sleep does.
    fn wait(&mut self) {
        let mut sources = [PollFd::new(&self.event, PollFlags::IN)];
        let now = Instant::now();
        let until = self
            .channel
            .deadline()
            .unwrap_or(now + Duration::from_millis(1));
        let wait = until
            .saturating_duration_since(now)
            .min(Duration::from_millis(1));
        poll(&mut sources, Some(&wait.try_into().unwrap())).unwrap();
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
    }

    fn one(
        &mut self,
        operation: Operation,
        offset: usize,
        buffers: Buffers,
        len: usize,
    ) -> Buffers {
        let tag = self.submit(operation, offset, buffers, len);
        self.finish();
        let (result, buffers) = self.results.remove(&tag).unwrap();
        assert_eq!(result, Ok(()), "{operation:?} at {offset}");
        buffers
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.one(Operation::Write, offset, filled(bytes), bytes.len());
    }

    fn read(&mut self, offset: usize, len: usize) -> Vec<u8> {
        let buffers = self.one(Operation::Read, offset, filled(&vec![0xdb; len]), len);
        content(&buffers)
    }

    fn simple(&mut self, operation: Operation, offset: usize, len: usize) {
        self.one(operation, offset, Buffers::none(), len);
    }
}

fn filled(bytes: &[u8]) -> Buffers {
    let buffers = Buffers::zeroed(bytes.len(), 4096).unwrap();
    buffers.copy_from(0, bytes);
    buffers
}

fn content(buffers: &Buffers) -> Vec<u8> {
    let mut bytes = vec![0; buffers.len() as usize];
    buffers.copy_to(0, &mut bytes);
    bytes
}

fn folder() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn image(path: &Path, direct: DirectMode) -> Arc<dyn BlockDevice> {
    let image = Image::open(&ImageOptions {
        path: path.into(),
        read_only: false,
        direct,
    });
    Arc::new(FileDevice::new(Arc::new(image.unwrap())))
}

fn cipher() -> Arc<SectorCipher> {
    let key: Vec<u8> = (7..71).collect();
    Arc::new(SectorCipher::new(&key).unwrap())
}

fn stamped(sectors: usize) -> Vec<u8> {
    (0..sectors as u64)
        .flat_map(|sector| sector.to_le_bytes().repeat(64))
        .collect()
}

struct Overlay {
    _folder: TempDir,
    path: PathBuf,
    options: files::OpenOptions,
    model: Vec<u8>,
}

impl Overlay {
    fn new(cipher: Option<Arc<SectorCipher>>, direct: DirectMode) -> Self {
        let folder = folder();
        let base = folder.path().join("base.img");
        let mut model = stamped(3 * 128 + 1);
        model.truncate(model.len() - 100);
        fs::write(&base, &model).unwrap();
        model.resize(6 * STRIPE, 0);
        let path = folder.path().join("disk.img");
        files::create(&CreateOptions {
            path: path.clone(),
            base: NewBase::Image(base, Format::Raw),
            bytes: Some(6 * STRIPE as u64),
            stripe_bytes: None,
            cipher: cipher.clone(),
        })
        .unwrap();
        Self {
            _folder: folder,
            path,
            options: files::OpenOptions {
                read_only: false,
                direct,
                cipher,
            },
            model,
        }
    }

    fn open(&self) -> OverlayDevice {
        OverlayDevice::new(files::open(&self.path, &self.options, None).unwrap())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Read(usize, usize),
    WriteZeroes(usize, usize),
    Discard(usize, usize),
    Flush,
    Snapshot,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || {
        (0..6 * 128_usize, 1..200_usize)
            .prop_map(|(start, len)| (start * 512, len.min(6 * 128 - start) * 512))
    };
    let step = prop_oneof![
        5 => (range(), any::<u8>()).prop_map(|((start, len), fill)| Step::Write(start, len, fill)),
        3 => range().prop_map(|(start, len)| Step::Read(start, len)),
        1 => range().prop_map(|(start, len)| Step::WriteZeroes(start, len)),
        1 => range().prop_map(|(start, len)| Step::Discard(start, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Snapshot),
    ];
    proptest::collection::vec(step, 1..20)
}

fn follow(mut overlay: Overlay, steps: &[Step]) {
    let mut device = overlay.open();
    let mut queue = Queue::open(&device);
    let mut snapshots = 0;
    for step in steps {
        match *step {
            Step::Write(start, len, fill) => {
                let bytes: Vec<u8> = (0..len).map(|place| fill ^ (place / 512) as u8).collect();
                queue.write(start, &bytes);
                overlay.model[start..start + len].copy_from_slice(&bytes);
            }
            Step::Read(start, len) => {
                assert!(
                    queue.read(start, len) == overlay.model[start..start + len],
                    "{step:?}"
                );
            }
            Step::WriteZeroes(start, len) => {
                queue.simple(Operation::WriteZeroes { unmap: true }, start, len);
                overlay.model[start..start + len].fill(0);
            }
            Step::Discard(start, len) => {
                queue.simple(Operation::Discard, start, len);
                // Either, sector by sector.
                let now = queue.read(start, len);
                let before = overlay.model[start..start + len].to_vec();
                for (now, before) in now.chunks(512).zip(before.chunks(512)) {
                    assert!(now == before || now == [0; 512]);
                }
                overlay.model[start..start + len].copy_from_slice(&now);
            }
            Step::Flush => queue.simple(Operation::Flush, 0, 0),
            Step::Snapshot => {
                queue.simple(Operation::Flush, 0, 0);
                drop(queue);
                drop(device);
                let cipher = overlay.options.cipher.clone();
                snapshot::snapshot(&overlay.path, &format!("s{snapshots}"), cipher).unwrap();
                snapshots += 1;
                device = overlay.open();
                queue = Queue::open(&device);
            }
        }
    }
    let all = overlay.model.len();
    assert!(queue.read(0, all) == overlay.model, "at the end");
    queue.simple(Operation::Flush, 0, 0);
    drop(queue);
    drop(device);
    let device = overlay.open();
    assert!(
        Queue::open(&device).read(0, all) == overlay.model,
        "opened again"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_overlay_on_a_ring_is_the_disk_that_was_written(
        steps in steps(), direct in any::<bool>(), encrypted in any::<bool>(),
    ) {
        let direct = if direct { DirectMode::Auto } else { DirectMode::Off };
        follow(Overlay::new(encrypted.then(cipher), direct), &steps);
    }
}

#[test]
fn many_requests_at_once_bring_up_what_they_share() {
    let overlay = Overlay::new(None, DirectMode::Auto);
    let device = overlay.open();
    let mut one = Queue::open(&device);
    let mut other = Queue::open(&device);
    // Every second sector from each queue.
    for sector in 0..6 * 128 {
        let queue = if sector % 2 == 0 {
            &mut one
        } else {
            &mut other
        };
        let bytes = [sector as u8; 512];
        queue.submit(Operation::Write, sector * 512, filled(&bytes), 512);
    }
    one.finish();
    other.finish();
    one.simple(Operation::Flush, 0, 0);
    for (sector, bytes) in one.read(0, 6 * STRIPE).chunks(512).enumerate() {
        assert!(
            bytes.iter().all(|byte| *byte == sector as u8),
            "sector {sector}"
        );
    }
    assert!(one.results.values().all(|(result, _)| *result == Ok(())));
}

#[test]
fn what_is_on_the_disk_is_what_dm_crypt_would_have_written() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let device = CryptDevice::new(image(&path, DirectMode::Auto), cipher(), 0);
    let mut queue = Queue::open(&device);
    let plain = stamped(300);
    queue.write(512 * 77, &plain);
    assert!(queue.read(512 * 77, plain.len()) == plain);
    assert_eq!(queue.read(0, 512), [0; 512], "never written");
    queue.simple(Operation::WriteZeroes { unmap: false }, 512 * 80, 512 * 3);
    assert_eq!(queue.read(512 * 80, 512 * 3), [0; 3 * 512]);
    queue.write(512 * 80, &plain[512 * 3..512 * 6]);
    queue.simple(Operation::Flush, 0, 0);
    // Its sectors, encrypted one by one with the number that they have on the disk.
    let stored = fs::read(&path).unwrap();
    for (sector, plain) in (77..).zip(plain.chunks(512)) {
        let mut expected = plain.to_vec();
        cipher().encrypt(sector, &mut expected);
        let place = sector as usize * 512;
        assert!(stored[place..place + 512] == expected, "sector {sector}");
    }
}

#[test]
fn a_limit_holds_on_its_own_and_with_a_group() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let now = Instant::now();
    let rate = |per_second| Rate {
        per_second,
        burst: Some(0),
    };
    let own = Limiter::new(
        Limits {
            bytes: Some(rate(4 << 20)),
            operations: None,
        },
        now,
    );
    let group = Limiter::new(
        Limits {
            bytes: None,
            operations: Some(rate(40)),
        },
        now,
    );
    let (own, group) = (Arc::new(own), Arc::new(group));
    let limiters = vec![Arc::clone(&own), Arc::clone(&group)];
    let device = LimitDevice::new(image(&path, DirectMode::Auto), limiters);
    let mut queue = Queue::open(&device);
    let start = Instant::now();
    // 2 MiB at 4 MiB/s; the first one is free.
    for place in 0..8 {
        queue.submit(
            Operation::Write,
            place << 18,
            filled(&vec![1; 1 << 18]),
            1 << 18,
        );
    }
    queue.finish();
    assert!(
        start.elapsed() >= Duration::from_millis(400),
        "{:?}",
        start.elapsed()
    );
    own.set(Limits::default(), Instant::now());
    let start = Instant::now();
    for place in 0..20 {
        queue.submit(Operation::Write, place << 12, filled(&[2; 4096]), 4096);
    }
    queue.finish();
    assert!(
        start.elapsed() >= Duration::from_millis(450),
        "{:?}",
        start.elapsed()
    );
    // Lifted while requests wait.
    for place in 0..200 {
        queue.submit(Operation::Write, place << 12, filled(&[3; 4096]), 4096);
    }
    group.set(Limits::default(), Instant::now());
    queue.finish();
    assert!(queue.results.values().all(|(result, _)| *result == Ok(())));
}

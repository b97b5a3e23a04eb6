//! The guest's side: rings, descriptors and headers of any content, and any results from the
//! kernel. The sanitizer finds accesses outside guest memory; here is checked that each chain
//! taken is handed back, and that nothing stays behind.
#![no_main]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use keelson_blk::disk::Disk;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::inflight_region::InflightMemory;
use keelson_blk::layer::file::FileDevice;
use keelson_blk::layer::ring::FileTable;
use keelson_blk::layer::{ChannelContext, RingOperations, Token, Waker};
use keelson_blk::metrics::QueueMetrics;
use keelson_blk::pinned_memory::PinnedMemory;
use keelson_blk::request_executor::{ExecutorSetup, RequestExecutor};
use keelson_blk::virtqueue::{Virtqueue, VirtqueueSetup};
use io_uring::squeue::Entry;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 0x4000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Where headers and indirect tables are.
const FREE: u64 = 0x1000;

fn disk() -> Arc<Disk> {
    static DISK: OnceLock<Arc<Disk>> = OnceLock::new();
    Arc::clone(DISK.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("keelson-fuzz-{}.img", std::process::id()));
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(&path);
        file.and_then(|file| file.set_len(1 << 20)).expect("an image");
        let image = Image::open(&ImageOptions {
            path: path.clone(),
            read_only: false,
            direct: DirectMode::Auto,
        });
        let _ = std::fs::remove_file(&path);
        let file = FileDevice::new(Arc::new(image.expect("an image")));
        Arc::new(Disk::new(Arc::new(file), *b"fuzzed-disk\0\0\0\0\0\0\0\0\0"))
    }))
}

/// Lays a guest's memory out from few bytes, so that what matters is reached soon: seven for each
/// descriptor of the queue, then four available heads, then an indirect table, then headers.
fn lay_out(memory: &GuestMemoryMmap, size: u16, content: &[u8]) {
    let mut bytes = content.iter().copied();
    let mut next = || bytes.next().unwrap_or(0);
    let mut table = |address: u64, count: u16| {
        for index in 0..u64::from(count) {
            let [low, high, len, scale, flags, following, wild] = std::array::from_fn(|_| next());
            let place = u64::from(u16::from_le_bytes([low, high]));
            let address_of_data = match wild {
                // Outside, across the end of memory, across the end of addresses.
                250..253 => place << 40,
                253..255 => MEMORY as u64 - place % 64,
                255 => u64::MAX - place,
                _ => place % (MEMORY as u64),
            };
            let len = u32::from(len) << (scale % 32);
            let mut descriptor = address_of_data.to_le_bytes().to_vec();
            descriptor.extend_from_slice(&len.to_le_bytes());
            descriptor.extend_from_slice(&u16::from(flags).to_le_bytes());
            descriptor.extend_from_slice(&u16::from(following).to_le_bytes());
            let _ = memory.write(&descriptor, GuestAddress(address + index * 16));
        }
    };
    table(DESCRIPTORS, size);
    table(FREE, 8);
    let mut available = vec![0; 2];
    available.extend_from_slice(&u16::from(next()).to_le_bytes());
    for _ in 0..4 {
        available.extend_from_slice(&u16::from(next()).to_le_bytes());
    }
    let _ = memory.write(&available, GuestAddress(AVAILABLE));
    let rest: Vec<u8> = bytes.collect();
    for (index, header) in rest.chunks(16).enumerate() {
        // A known type and a sector that is there are too rare in random bytes.
        let mut header = header.to_vec();
        header.resize(16, 0);
        header[1..8].fill(0);
        header[10..16].fill(0);
        let _ = memory.write(&header, GuestAddress(FREE + 0x400 + index as u64 * 16));
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((setup, content)) = input.split_first_chunk::<4>() else {
        return;
    };
    let regions = [
        (GuestAddress(0), MEMORY / 2),
        (GuestAddress(MEMORY as u64 / 2), MEMORY / 2),
    ];
    let Ok(memory) = GuestMemoryMmap::from_ranges(&regions) else {
        return;
    };
    if setup[3] & 2 == 0 {
        lay_out(&memory, 1 << (setup[0] % 6), content);
    } else {
        let _ = memory.write(content, GuestAddress(0));
    }
    let memory = Arc::new(memory);
    let virtqueue = Virtqueue::new(
        VirtqueueSetup {
            size: 1 << (setup[0] % 6),
            descriptor_table: GuestAddress(DESCRIPTORS),
            available_ring: GuestAddress(AVAILABLE),
            used_ring: GuestAddress(USED),
            next_available: u16::from(setup[1] & 3),
            event_idx: setup[2] & 1 != 0,
            indirect: setup[2] & 2 != 0,
        },
        memory,
    );
    let Ok(virtqueue) = virtqueue else { return };
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let waker = Waker::new(Arc::new(event));
    let mut files = FileTable::default();
    let mut context = ChannelContext::new(&mut files, None, &waker);
    let disk = disk();
    let size = 1 << (setup[0] % 6);
    let inflight = (setup[3] & 1 != 0).then(|| {
        let (file, bytes) = InflightMemory::create(1, size).expect("a memfd");
        // What another backend, or a hostile frontend, has left there.
        let _ = file.write_all_at(content.get(..256).unwrap_or(content), 0);
        let memory = InflightMemory::map(file, 0, bytes, 1, size).expect("a mapping");
        memory.region(0, size).expect("a region")
    });
    let mut executor = RequestExecutor::new(
        virtqueue,
        ExecutorSetup {
            index: 0,
            channel: disk.device().open_channel(&mut context).expect("a channel"),
            disk,
            metrics: Arc::<QueueMetrics>::default(),
            guards: Vec::new(),
            inflight,
            dirty_log: None,
            pinned: PinnedMemory::default(),
        },
    );
    let mut ring = RingOperations::new(0);
    let mut results = content.chunks_exact(2);
    for _ in 0..4 {
        let _ = executor.take_requests(&mut ring);
        while !ring.entries().is_empty() {
            let tokens: Vec<u64> = ring.entries().iter().map(Entry::get_user_data).collect();
            ring.clear();
            for token in tokens {
                let result = match results.next() {
                    Some([low, high]) => i32::from(i16::from_le_bytes([*low, *high])),
                    _ => -5,
                };
                executor.complete(Token::from_user_data(token), result, &mut ring);
            }
        }
        let _ = executor.answer_completed();
        let _ = executor.publish();
        assert!(executor.is_idle());
    }
});

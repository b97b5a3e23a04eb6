//! The guest's side: rings, descriptors and headers of any content, and any results from the
//! kernel. The sanitizer finds accesses outside guest memory; here is checked that each chain
//! taken is handed back, and that nothing stays behind.
#![no_main]

use std::fs::OpenOptions;
use std::sync::{Arc, OnceLock};

use keelson_blk::disk::Disk;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::metrics::QueueMetrics;
use keelson_blk::request_executor::RequestExecutor;
use keelson_blk::virtqueue::{Virtqueue, VirtqueueSetup};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 0x4000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

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
        Arc::new(Disk::new(image.expect("an image"), *b"fuzzed-disk\0\0\0\0\0\0\0\0\0"))
    }))
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
    let _ = memory.write(content, GuestAddress(0));
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
    let metrics = Arc::<QueueMetrics>::default();
    let mut executor = RequestExecutor::new(0, virtqueue, disk(), metrics);
    let mut results = content.chunks_exact(2);
    for _ in 0..4 {
        let _ = executor.take_requests();
        while let Some(operation) = executor.take_operation() {
            let result = match results.next() {
                Some([low, high]) => i32::from(i16::from_le_bytes([*low, *high])),
                _ => -5,
            };
            let _ = executor.complete(operation.get_user_data(), result);
        }
        let _ = executor.take_notification();
        assert!(executor.is_idle());
    }
});

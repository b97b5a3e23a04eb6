//! Arbitrary descriptor tables in guest memory: whatever a guest writes, nothing panics, every
//! address given to the kernel is in guest memory, and what is acknowledged was done.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::sync::Arc;

use io_uring::squeue::Entry;
use keelson_blk::descriptor_chain::{DescriptorChain, DescriptorTable};
use keelson_blk::disk::Disk;
use keelson_blk::guest_memory::append_iovecs;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::layer::file::FileDevice;
use keelson_blk::layer::ring::FileTable;
use keelson_blk::layer::{ChannelContext, RingOperations, Token, Waker};
use keelson_blk::metrics::QueueMetrics;
use keelson_blk::pinned_memory::PinnedMemory;
use keelson_blk::request::{self, transfer_offset};
use keelson_blk::request_executor::{ExecutorSetup, RequestExecutor};
use keelson_blk::virtqueue::{Virtqueue, VirtqueueSetup};
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

// Two regions that touch, and one after a hole.
const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x4000), (0x10000, 0x2000)];

fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&REGIONS.map(|(start, len)| (GuestAddress(start), len))).unwrap()
}

fn image() -> (harness::Scene, Image) {
    let scene = harness::Scene::new(1 << 20);
    let image = Image::open(&ImageOptions {
        path: scene.image.clone(),
        read_only: false,
        direct: DirectMode::Auto,
    });
    (scene, image.unwrap())
}

// Descriptors that are often nearly right: random ones alone never get past the header.
fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let address = prop_oneof![
        4 => 0_u64..0x12100,
        1 => Just(TABLE),
        1 => any::<u64>(),
        1 => (0_u64..64).prop_map(|back| u64::MAX - back),
    ];
    let len = prop_oneof![
        2 => Just(16_u32),
        2 => Just(512_u32),
        2 => Just(1_u32),
        1 => Just(0_u32),
        1 => 0_u32..0x3000,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0_u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    })
}

fn header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![8 => 0_u32..12, 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0_u64..2050, 1 => any::<u64>()];
    (kind, sector).prop_map(|(kind, sector)| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    })
}

fn fill(memory: &GuestMemoryMmap, descriptors: &[[u8; 16]], header: [u8; 16]) {
    // The header everywhere a descriptor may point to, so that it is often found.
    for address in (0x4000..0x8000).chain(0x10000..0x12000).step_by(16) {
        memory.write_slice(&header, GuestAddress(address)).unwrap();
    }
    for (index, descriptor) in descriptors.iter().enumerate() {
        let address = GuestAddress(TABLE + index as u64 * 16);
        memory.write_slice(descriptor, address).unwrap();
    }
}

fn is_inside(memory: &GuestMemoryMmap, iovec: &libc::iovec) -> bool {
    let start = iovec.iov_base as usize;
    memory.iter().any(|region| {
        let base = region.get_host_address(vm_memory::MemoryRegionAddress(0));
        let base = base.unwrap() as usize;
        let end = base + usize::try_from(region.len()).unwrap();
        base <= start && start + iovec.iov_len <= end
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn chains_and_requests_stay_inside_guest_memory(
        descriptors in vec(descriptor(), usize::from(SIZE)),
        header in header(),
        head in 0..SIZE + 2,
        indirect in any::<bool>(),
    ) {
        let memory = guest_memory();
        fill(&memory, &descriptors, header);
        let table = DescriptorTable {
            address: GuestAddress(TABLE),
            size: u32::from(SIZE),
            indirect,
        };
        let mut chain = DescriptorChain::default();
        if chain.collect(&memory, table, head).is_ok() {
            let before: u64 = chain.readable.iter().chain(&chain.writable)
                .map(|segment| u64::from(segment.len)).sum();
            if let Ok(request) = request::parse(&memory, &mut chain) {
                // 16 bytes of header and 1 of status were taken off, nothing else.
                let after: u64 = chain.readable.iter().chain(&chain.writable)
                    .map(|segment| u64::from(segment.len)).sum();
                prop_assert_eq!(before, after + 17);
                prop_assert!(request.data_len <= after);
                prop_assert!(memory.address_in_range(request.status));
                for segment in chain.readable.iter().chain(&chain.writable) {
                    let mut iovecs = Vec::new();
                    if append_iovecs(&memory, *segment, &mut iovecs) {
                        let total: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                        prop_assert_eq!(total, segment.len as usize);
                        prop_assert!(iovecs.iter().all(|iovec| is_inside(&memory, iovec)));
                    }
                }
            }
        }
    }

    #[test]
    fn transfers_stay_inside_the_disk(
        sector in prop_oneof![any::<u64>(), 0_u64..1 << 20],
        data_len in prop_oneof![any::<u64>(), (0_u64..100).prop_map(|sectors| sectors * 512)],
        capacity in 0_u64..1 << 40,
        block in prop_oneof![Just(512_u64), Just(4096)],
    ) {
        if let Some(offset) = transfer_offset(sector, data_len, capacity, block) {
            prop_assert_eq!((offset % block, data_len % block), (0, 0));
            prop_assert!(offset + data_len <= capacity * 512);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    // The whole executor, with the kernel's results made up: every chain it takes is handed
    // back exactly once, however long the kernel takes and whatever it answers.
    #[test]
    fn the_executor_hands_every_chain_back_once(
        descriptors in vec(descriptor(), usize::from(SIZE)),
        header in header(),
        heads in vec(0..SIZE, 1..=usize::from(SIZE)),
        results in vec(
            prop_oneof![-40_i32..0, Just(0), Just(512), Just(100), Just(i32::MAX)], 32,
        ),
    ) {
        let memory = Arc::new(guest_memory());
        fill(&memory, &descriptors, header);
        for (slot, head) in heads.iter().enumerate() {
            let address = GuestAddress(AVAILABLE + 4 + slot as u64 * 2);
            memory.write_obj(*head, address).unwrap();
        }
        memory.write_obj(u16::try_from(heads.len()).unwrap(), GuestAddress(AVAILABLE + 2)).unwrap();
        let setup = VirtqueueSetup {
            size: SIZE,
            descriptor_table: GuestAddress(TABLE),
            available_ring: GuestAddress(AVAILABLE),
            used_ring: GuestAddress(USED),
            next_available: 0,
            event_idx: false,
            indirect: true,
        };
        let (_scene, image) = image();
        let device = FileDevice::new(Arc::new(image));
        let disk = Arc::new(Disk::new(Arc::new(device), [0; 20]));
        let queue = Virtqueue::new(setup, Arc::clone(&memory)).unwrap();
        let waker = Waker::new(Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
        let mut files = FileTable::default();
        let mut context = ChannelContext::new(&mut files, None, &waker);
        let mut executor = RequestExecutor::new(queue, ExecutorSetup {
            index: 0,
            channel: disk.device().open_channel(&mut context).unwrap(),
            disk,
            metrics: Arc::<QueueMetrics>::default(),
            guards: Vec::new(),
            inflight: None,
            dirty_log: None,
            pinned: PinnedMemory::default(),
        });
        let mut ring = RingOperations::new(0);
        let outcome = executor.take_requests(&mut ring);
        let mut results = results.into_iter();
        while !ring.entries().is_empty() {
            let tokens: Vec<u64> = ring.entries().iter().map(Entry::get_user_data).collect();
            ring.clear();
            for token in tokens {
                let result = results.next().unwrap_or(-libc::EIO);
                executor.complete(Token::from_user_data(token), result, &mut ring);
            }
        }
        prop_assert!(executor.answer_completed().is_ok());
        executor.publish();
        prop_assert!(executor.is_idle());
        let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let taken = executor.next_available();
        if outcome.is_err() {
            // The one that broke the queue was taken and not answered.
            prop_assert_eq!(used, taken - 1);
        } else {
            prop_assert_eq!(used, taken);
            prop_assert_eq!(usize::from(taken), heads.len());
        }
    }
}

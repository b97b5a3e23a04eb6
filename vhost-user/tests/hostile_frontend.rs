//! Frontends that send nonsense: their connection ends, and the next frontend is served.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use harness::driver::{Driver, USUAL};
use harness::raw_guest::{DATA, RawGuest};
use harness::{Backend, PATIENCE, Scene, pattern};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

// The backend still serves.
fn assert_serving(scene: &Scene, backend: &mut Backend) {
    assert!(backend.is_running());
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    assert_eq!(driver.write(0, &[3; 4096]), 0);
    assert_eq!(driver.read(0, 4096).unwrap(), [3; 4096]);
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let mut bytes = request.to_le_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[test]
fn every_request_with_random_bodies_ends_in_nothing_worse_than_a_disconnect() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&["--queues", "2"]);
    for request in 0..48_u32 {
        for (round, len) in [0, 4, 8, 12, 40, 256].into_iter().enumerate() {
            let mut connection = UnixStream::connect(&scene.socket).unwrap();
            let body = pattern(u64::from(request) << 8 | round as u64, len);
            // Owner and features first, so that more of the requests are acted on.
            let mut bytes = message(3, 1, &[]);
            bytes.extend(message(2, 1, &(1_u64 << 30 | 1 << 32).to_le_bytes()));
            bytes.extend(message(16, 1, &0x8209_u64.to_le_bytes()));
            bytes.extend(message(request, 1 | 8, &body));
            connection.write_all(&bytes).unwrap();
            connection.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            // A reset is as good an end as any.
            let _ = connection.read_to_end(&mut answer);
        }
    }
    assert_serving(&scene, &mut backend);
}

#[test]
fn headers_that_are_no_headers_end_the_connection() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let oversized = [3, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255];
    for bytes in [&[0xff; 64][..], &oversized, &[1, 0, 0], &[]] {
        let mut connection = UnixStream::connect(&scene.socket).unwrap();
        connection.write_all(bytes).unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = connection.read_to_end(&mut Vec::new());
    }
    assert_serving(&scene, &mut backend);
}

/// Descriptors of the process, and its mappings of guests' memory.
fn holdings(backend: &Backend) -> [usize; 2] {
    let folder = format!("/proc/{}", backend.id());
    let descriptors = std::fs::read_dir(format!("{folder}/fd")).unwrap();
    let mappings = std::fs::read_to_string(format!("{folder}/maps")).unwrap();
    let of_guests = |line: &&str| line.contains("/memfd:");
    [
        descriptors.count(),
        mappings.lines().filter(of_guests).count(),
    ]
}

#[test]
fn frontends_that_come_with_too_much_and_leave_in_the_middle_leave_nothing_behind() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let memory = memfd_create("surplus", MemfdFlags::CLOEXEC).unwrap();
    let round = |number: usize| {
        let mut guest = RawGuest::connect(&scene.socket, 0);
        match number % 4 {
            0 => {
                guest.chain(0, 0, (DATA, 4096), true);
                guest.submit(0);
            }
            1 => {
                guest.cut_memory_off();
                guest.kick.write(1).unwrap();
            }
            2 => {
                // Queue 0 again and again, each time with new descriptors.
                for _ in 0..8 {
                    guest.set_up_queue(0);
                }
                let missing = region(&memory, 0, 4096);
                assert!(guest.frontend.set_mem_table(&[missing]).is_err());
            }
            _ => {}
        }
        drop(guest);
        // Descriptors where none belong, and more than any message has.
        for count in [1, 9, 64] {
            let connection = UnixStream::connect(&scene.socket).unwrap();
            let descriptors = vec![memory.as_fd(); count];
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let bytes = message(1, 1, &[]);
            let bytes = [IoSlice::new(&bytes)];
            sendmsg(&connection, &bytes, &mut control, SendFlags::NOSIGNAL).unwrap();
            connection.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = (&connection).read_to_end(&mut Vec::new());
        }
    };
    let settle = |wanted: &dyn Fn([usize; 2]) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = holdings(&backend);
            if wanted(now) {
                return now;
            }
            assert!(Instant::now() < deadline, "it stays at {now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // What comes with the first is there to stay: threads, tables.
    (0..4).for_each(round);
    let mut before = settle(&|[_, mappings]| mappings == 0);
    // The last connection is closed a moment after its memory.
    std::thread::sleep(Duration::from_millis(300));
    before[0] = holdings(&backend)[0];
    (0..60).for_each(round);
    settle(&|now| now == before);
    assert_serving(&scene, &mut backend);
}

fn region(descriptor: &impl AsRawFd, guest: u64, size: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: guest.wrapping_add(0x1000_0000),
        mmap_offset: 0,
        mmap_handle: descriptor.as_raw_fd(),
    }
}

#[test]
fn memory_that_cannot_be_mapped_is_refused() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let short = File::from(memfd_create("short", MemfdFlags::CLOEXEC).unwrap());
    short.set_len(4096).unwrap();
    let null = File::open("/dev/null").unwrap();
    let directory = File::open("/").unwrap();
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let tables = [
        vec![region(&short, 0, 8192)],
        vec![region(&null, 0, 4096)],
        vec![region(&directory, 0, 4096)],
        vec![region(&pipe, 0, 4096)],
        vec![region(&short, 0, 4096), region(&short, 0, 4096)],
        vec![region(&short, 0, 4096), region(&short, 4095, 4096)],
        vec![region(&short, u64::MAX - 4095, 4096)],
    ];
    for (number, table) in tables.iter().enumerate() {
        let guest = RawGuest::connect(&scene.socket, 0);
        assert!(guest.frontend.set_mem_table(table).is_err(), "{number}");
    }
    assert_serving(&scene, &mut backend);
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let connect = || RawGuest::connect_without_queue(&scene.socket, 0);
    for size in [0, 3, 2048, u16::MAX] {
        assert!(connect().frontend.set_vring_num(0, size).is_err(), "{size}");
    }
    assert!(connect().frontend.set_vring_num(1, 16).is_err());
    assert!(connect().frontend.set_vring_enable(63, true).is_err());
    assert!(connect().frontend.get_vring_base(1).is_err());
    assert!(connect().frontend.set_owner().is_err(), "owned twice");
    assert!(connect().frontend.set_features(1 << 50).is_err());

    let good = RawGuest::ring_addresses();
    for addresses in [
        VringConfigData {
            desc_table_addr: 0x1000,
            ..good
        },
        VringConfigData {
            used_ring_addr: good.used_ring_addr + (4 << 20) - 0x3000 - 8,
            ..good
        },
        VringConfigData {
            avail_ring_addr: !0xf,
            ..good
        },
    ] {
        let mut guest = connect();
        let frontend = &mut guest.frontend;
        let outcome = frontend
            .set_vring_num(0, 16)
            .and_then(|()| frontend.set_vring_addr(0, &addresses))
            .and_then(|()| frontend.set_vring_kick(0, &guest.kick))
            .and_then(|()| guest.frontend.set_vring_enable(0, true));
        assert!(outcome.is_err());
    }
    assert_serving(&scene, &mut backend);
}

#[test]
fn a_kick_that_is_no_eventfd_does_no_harm() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let file = File::open(&scene.image).unwrap();
    for descriptor in [file.as_raw_fd(), std::io::stderr().as_raw_fd()] {
        let mut guest = RawGuest::connect_without_queue(&scene.socket, 0);
        guest.frontend.set_vring_num(0, 16).unwrap();
        let addresses = RawGuest::ring_addresses();
        guest.frontend.set_vring_addr(0, &addresses).unwrap();
        guest.set_kick_to(descriptor);
        let _ = guest.frontend.set_vring_enable(0, true);
    }
    assert_serving(&scene, &mut backend);
}

#[test]
fn queues_can_be_stopped_moved_and_started_again_with_requests_in_flight() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(1, 4096));
    let mut backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    for round in 1..=50_u16 {
        guest.chain(0, 0, (DATA, 4096), true);
        guest.submit(0);
        // Without waiting: stopping has to complete it first, whether it was seen or not.
        match round % 3 {
            0 => {
                let base = guest.frontend_base();
                assert!(base == round || base == round - 1);
                guest.set_up_queue(base);
            }
            1 => {
                guest.frontend.set_vring_enable(0, false).unwrap();
                guest.frontend.set_vring_enable(0, true).unwrap();
            }
            _ => guest.share_memory(),
        }
        assert_eq!(guest.wait_used(), (0, 4097));
        assert!(guest.get(DATA, 4096) == pattern(1, 4096));
    }
    drop(guest);
    assert_serving(&scene, &mut backend);
}

#[test]
fn a_memory_file_that_is_cut_off_breaks_the_queue_only() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.chain(0, 0, (DATA, 512), true);
    assert_eq!(guest.perform(), (0, 513));
    guest.cut_memory_off();
    guest.kick.write(1).unwrap();
    guest.wait_broken();
    drop(guest);
    assert_serving(&scene, &mut backend);
}

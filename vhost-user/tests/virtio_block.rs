//! The block device section of virtio 1.2, clause by clause, where other tests don't have it.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::os::unix::fs::MetadataExt;

use harness::driver::{Driver, USUAL};
use harness::loop_device::LoopDevice;
use harness::raw_guest::{
    DATA, HEADER, INDIRECT, INDIRECT_FLAG, NEXT, RawGuest, STATUS, TABLE, WRITE,
};
use harness::{Backend, Scene, pattern};
use vhost::VhostBackend;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_INDIRECT_DESC: u64 = 1 << 28;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const MIB: u64 = 1 << 20;

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

// A discard or write-zeroes request of these ranges: first sector, sectors, flags.
fn ranges(guest: &mut RawGuest, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&sectors.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    guest.put(DATA, &bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    guest.chain(kind, 0, (DATA, len), false);
    guest.perform().0
}

fn features(arguments: &[&str]) -> u64 {
    let scene = Scene::new(MIB);
    let _backend = scene.start(arguments);
    let guest = RawGuest::connect_without_queue(&scene.socket, 0);
    guest.frontend.get_features().unwrap()
}

#[test]
fn clause_5_2_3_the_features_are_those_that_the_disk_has() {
    // SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, DISCARD, WRITE_ZEROES.
    let always = [1, 2, 6, 9, 10, 11];
    let writable = [13, 14];
    let block = |bits: &[u32]| bits.iter().fold(0_u64, |all, bit| all | 1 << bit);
    // All bits of the device, up to the transport's.
    let device = |features: u64| features & ((1 << 24) - 1);
    let expected = block(&always) | block(&writable);
    assert_eq!(device(features(&[])), expected);
    assert_eq!(device(features(&["--queues", "2"])), expected | 1 << 12);
    assert_eq!(device(features(&["--read-only"])), block(&always) | 1 << 5);
}

#[test]
fn clause_5_2_3_1_nothing_that_is_legacy_is_offered() {
    // BARRIER, SCSI, and what only a transitional device needs: NOTIFY_ON_EMPTY, ANY_LAYOUT.
    let legacy = 1 | 1 << 7 | 1 << 24 | 1 << 27;
    let offered = features(&[]);
    assert_eq!(offered & legacy, 0);
    assert_ne!(offered & 1 << 32, 0, "VERSION_1");
}

#[test]
fn clause_5_2_5_2_the_write_cache_begins_as_what_was_negotiated_says() {
    let scene = Scene::new(MIB);
    let _backend = scene.start(&[]);
    for (taken, writeback) in [(F_FLUSH | F_CONFIG_WCE, 1), (F_CONFIG_WCE, 0)] {
        let mut guest = RawGuest::connect(&scene.socket, taken);
        let offered = guest.frontend.get_features().unwrap();
        assert_eq!(offered & F_FLUSH, F_FLUSH, "CONFIG_WCE is never without");
        assert_eq!(guest.config(32, 1), [writeback], "{taken:#x}");
    }
}

#[test]
fn clause_5_2_5_2_padding_is_zero() {
    let scene = Scene::new(MIB);
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let config = guest.config(0, 60);
    assert_eq!(config[33], 0, "unused0");
    assert_eq!(config[57..60], [0; 3], "unused1");
}

#[test]
fn clause_5_2_6_reads_and_writes_move_whole_sectors_where_they_say() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(6, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.chain(IN, 2047, (DATA, 512), true);
    // The status byte counts as written, too.
    assert_eq!(guest.perform(), (OK, 513));
    assert!(guest.get(DATA, 512) == pattern(6, 1 << 20)[2047 * 512..]);
    guest.put(DATA, &[9; 1024]);
    guest.chain(OUT, 5, (DATA, 1024), false);
    assert_eq!(guest.perform(), (OK, 1));
    assert!(scene.image_bytes(5 * 512, 1024) == [9; 1024]);
    assert!(scene.image_bytes(7 * 512, 512) == pattern(6, 1 << 20)[7 * 512..8 * 512]);
    // 5.2.6.1: data are whole sectors on the disk. Anything else changes nothing.
    for (sector, len) in [(5, 511), (2048, 512), (2047, 1024), (u64::MAX, 512)] {
        guest.chain(OUT, sector, (DATA, len), false);
        assert_eq!(guest.perform().0, IOERR, "{sector} {len}");
    }
    assert!(scene.image_bytes(2047 * 512, 512) == pattern(6, 1 << 20)[2047 * 512..]);
}

#[test]
fn clause_5_2_6_1_a_request_may_have_seg_max_segments_of_any_size() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(7, 1 << 20));
    let _backend = scene.start(&["--queue-size", "1024"]);
    let mut guest = RawGuest::connect(&scene.socket, F_INDIRECT_DESC);
    let segments = u16::try_from(little_endian(&guest.config(12, 4))).unwrap();
    assert!(segments > 100, "{segments}");
    guest.header(IN, 3);
    let table = u32::from(segments + 2) * 16;
    guest.descriptor(TABLE, 0, (INDIRECT, table, INDIRECT_FLAG, 0));
    guest.descriptor(INDIRECT, 0, (HEADER, 16, NEXT, 1));
    // Backwards in memory, with gaps.
    let place = |segment: u16| DATA + u64::from(segments - segment) * 1024;
    for segment in 1..=segments {
        let data = (place(segment), 512, NEXT | WRITE, segment + 1);
        guest.descriptor(INDIRECT, segment, data);
    }
    guest.descriptor(INDIRECT, segments + 1, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.perform(), (OK, u32::from(segments) * 512 + 1));
    let content = pattern(7, 1 << 20);
    for segment in 1..=segments {
        let from = (3 + usize::from(segment) - 1) * 512;
        assert!(guest.get(place(segment), 512) == content[from..from + 512]);
    }
}

#[test]
fn clause_5_2_6_2_after_write_zeroes_reads_return_zeroes_whatever_was_there() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(8, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    for flags in [0, 1] {
        guest.put(DATA, &[7; 4096]);
        guest.chain(OUT, 64, (DATA, 4096), false);
        assert_eq!(guest.perform().0, OK);
        assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(65, 6, flags)]), OK);
        guest.chain(IN, 64, (DATA, 4096), true);
        assert_eq!(guest.perform().0, OK);
        let mut expected = [7; 4096];
        expected[512..7 * 512].fill(0);
        assert!(guest.get(DATA, 4096) == expected, "flags {flags}");
    }
}

#[test]
fn clause_5_2_6_2_a_write_is_stable_when_it_completes_or_with_the_flush_after_it() {
    let scene = Scene::new(16 * MIB);
    let Some(device) = LoopDevice::over(&scene.image) else {
        return;
    };
    let _backend = Backend::start(harness::command(device.path().as_ref(), &scene.socket));
    let flushes = || harness::loop_device::flushes(device.path());
    let write = |guest: &mut RawGuest| {
        guest.chain(OUT, 0, (DATA, 512), false);
        assert_eq!(guest.perform().0, OK);
    };
    // Case 1: without FLUSH; case 2: writeback is 0; case 3: a flush.
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let before = flushes();
    write(&mut guest);
    assert!(flushes() > before);
    drop(guest);
    let mut guest = RawGuest::connect(&scene.socket, F_FLUSH | F_CONFIG_WCE);
    guest.set_config(32, &[0]);
    let before = flushes();
    write(&mut guest);
    assert!(flushes() > before);
    guest.set_config(32, &[1]);
    let before = flushes();
    write(&mut guest);
    assert_eq!(flushes(), before);
    guest.header(FLUSH, 0);
    guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
    guest.descriptor(TABLE, 1, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.perform().0, OK);
    assert!(flushes() > before);
}

#[test]
fn clause_2_7_5_3_2_the_write_flag_of_an_indirect_table_is_ignored() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(9, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, F_INDIRECT_DESC);
    guest.descriptor(INDIRECT, 0, (DATA, 512, NEXT | WRITE, 1));
    guest.descriptor(INDIRECT, 1, (STATUS, 1, WRITE, 0));
    // And the table may follow descriptors that are chained in the usual way.
    for flags in [INDIRECT_FLAG, INDIRECT_FLAG | WRITE] {
        guest.header(IN, 1);
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (INDIRECT, 32, flags, 0));
        assert_eq!(guest.perform(), (OK, 513), "{flags:#x}");
        assert!(guest.get(DATA, 512) == pattern(9, 1 << 20)[512..1024]);
    }
}

#[test]
fn clause_5_2_4_the_configuration_has_the_limits_of_discard_and_write_zeroes() {
    let scene = Scene::new(MIB);
    let _backend = scene.start(&["--queues", "3"]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let config = guest.config(0, 60);
    assert_eq!(little_endian(&config[0..8]), 2048);
    assert_eq!(little_endian(&config[34..36]), 3);
    for limit in [36..40, 40..44, 44..48, 48..52, 52..56] {
        assert!(little_endian(&config[limit.clone()]) > 0, "{limit:?}");
    }
    assert_eq!(config[56], 1, "zeroes may be unmapped");
}

#[test]
fn clause_5_2_4_topology_and_block_size_are_those_of_the_device() {
    let scene = Scene::new(16 * MIB);
    let Some(device) = LoopDevice::with_sectors(&scene.image, 4096) else {
        return;
    };
    let _backend = Backend::start(harness::command(device.path().as_ref(), &scene.socket));
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let config = guest.config(0, 60);
    assert_eq!(little_endian(&config[20..24]), 4096);
    // Zeroes have to be whole blocks; a discard leaves what it covers in part.
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(1, 8, 0)]), IOERR);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(8, 8, 0)]), OK);
    assert_eq!(ranges(&mut guest, DISCARD, &[(1, 8, 0)]), OK);
}

#[test]
fn clause_5_2_6_discard_gives_space_back_and_keeps_the_rest() {
    let scene = Scene::new(4 * MIB);
    scene.fill(0, &pattern(1, 4 << 20));
    let _backend = scene.start(&[]);
    let before = scene.image.metadata().unwrap().blocks();
    let mut guest = RawGuest::connect(&scene.socket, 0);
    // Two ranges in one request.
    let status = ranges(&mut guest, DISCARD, &[(2048, 2048, 0), (6144, 1024, 0)]);
    assert_eq!(status, OK);
    let after = scene.image.metadata().unwrap().blocks();
    assert!(
        after + 2048 <= before,
        "{after} of {before} blocks are left"
    );
    let bytes = scene.image_bytes(0, 4 << 20);
    let expected = pattern(1, 4 << 20);
    assert!(bytes[..1 << 20] == expected[..1 << 20]);
    assert!(bytes[2 << 20..3 << 20] == expected[2 << 20..3 << 20]);
    assert_eq!(scene.image.metadata().unwrap().len(), 4 * MIB);
}

#[test]
fn clause_5_2_6_write_zeroes_zeroes_with_and_without_unmap() {
    for (flags, size) in [(0, 4 * MIB), (1, 4 * MIB), (0, 4 * MIB - 100)] {
        let scene = Scene::new(size);
        let content = pattern(2, usize::try_from(size).unwrap());
        scene.fill(0, &content);
        let _backend = scene.start(&[]);
        let mut guest = RawGuest::connect(&scene.socket, 0);
        assert_eq!(
            ranges(
                &mut guest,
                WRITE_ZEROES,
                &[(3, 5, flags), (8000, 191, flags)]
            ),
            OK
        );
        let bytes = scene.image_bytes(0, content.len());
        assert!(bytes[..3 * 512] == content[..3 * 512]);
        assert!(bytes[3 * 512..8 * 512].iter().all(|byte| *byte == 0));
        assert!(bytes[8 * 512..8000 * 512] == content[8 * 512..8000 * 512]);
        assert!(bytes[8000 * 512..8191 * 512].iter().all(|byte| *byte == 0));
        assert!(bytes[8191 * 512..] == content[8191 * 512..]);
    }
}

#[test]
fn clause_5_2_6_1_zeroes_are_written_where_the_file_system_has_no_other_way() {
    let scene = Scene::new(MIB);
    let Some(small) = harness::loop_device::SmallFileSystem::mount(scene.directory.path(), 8 << 20)
    else {
        return;
    };
    // tmpfs has no FALLOC_FL_ZERO_RANGE.
    let image = small.path().join("image");
    std::fs::write(&image, pattern(3, 1 << 20)).unwrap();
    let backend = Backend::start(harness::command(&image, &scene.socket));
    let mut guest = RawGuest::connect(&scene.socket, 0);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(100, 1000, 0)]), OK);
    let bytes = std::fs::read(&image).unwrap();
    let content = pattern(3, 1 << 20);
    assert!(bytes[..100 * 512] == content[..100 * 512]);
    assert!(bytes[100 * 512..1100 * 512].iter().all(|byte| *byte == 0));
    assert!(bytes[1100 * 512..] == content[1100 * 512..]);
    drop(guest);
    assert_eq!(backend.terminate().code(), Some(0));
}

#[test]
fn clause_5_2_6_2_ranges_and_flags_that_are_wrong_are_refused_and_change_nothing() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(4, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    // Unmap is no flag of a discard, and the other bits are reserved.
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    for kind in [DISCARD, WRITE_ZEROES] {
        // Beyond the end, around the end of numbers, and a good range before a bad one.
        assert_eq!(ranges(&mut guest, kind, &[(2047, 2, 0)]), IOERR);
        assert_eq!(ranges(&mut guest, kind, &[(u64::MAX, 2, 0)]), IOERR);
        assert_eq!(ranges(&mut guest, kind, &[(0, u32::MAX, 0)]), IOERR);
        assert_eq!(ranges(&mut guest, kind, &[(0, 8, 0), (2048, 1, 0)]), IOERR);
        assert_eq!(ranges(&mut guest, kind, &[(0, 8, 0); 33]), IOERR);
        guest.chain(kind, 0, (DATA, 15), false);
        assert_eq!(guest.perform().0, IOERR);
        assert_eq!(ranges(&mut guest, kind, &[(8, 0, 0)]), OK);
    }
    assert!(scene.image_bytes(0, 1 << 20) == pattern(4, 1 << 20));
}

#[test]
fn clause_5_2_6_2_a_read_only_device_refuses_what_changes_it() {
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(5, 1 << 20));
    let _backend = scene.start(&["--read-only"]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.chain(OUT, 0, (DATA, 512), false);
    assert_eq!(guest.perform().0, IOERR);
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, 8, 0)]), UNSUPP);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(0, 8, 0)]), UNSUPP);
    assert!(scene.image_bytes(0, 1 << 20) == pattern(5, 1 << 20));
}

#[test]
fn clause_2_7_13_a_chain_that_is_in_flight_is_not_taken_again() {
    let scene = Scene::new(MIB);
    let mut backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.header(OUT, 0);
    guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
    guest.descriptor(TABLE, 1, (DATA, 512, NEXT, 2));
    guest.descriptor(TABLE, 2, (STATUS, 1, WRITE, 0));
    // The same head many times before one kick: the device may have finished one or more.
    for _ in 0..16 {
        guest.submit(0);
    }
    guest.wait_used();
    assert!(backend.is_running());
    drop(guest);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    assert_eq!(driver.write(0, &[1; 512]), 0);
}

#[test]
fn clause_5_2_5_queues_up_to_64_carry_one_disk() {
    let scene = Scene::new(4 * MIB);
    let backend = scene.start(&["--queues", "64", "--workers", "2"]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 64, 1 << 20);
    for queue in 0..64_usize {
        driver.put(queue * 4096, &pattern(queue as u64, 4096));
        driver.queue_write(queue, queue as u64 * 4096, queue * 4096, 4096, 0);
    }
    for queue in 0..64 {
        assert_eq!(driver.finish(queue, 1)[0].ret, 0);
    }
    drop(driver);
    assert_eq!(backend.terminate().code(), Some(0));
    for queue in 0..64_usize {
        let found = scene.image_bytes(queue as u64 * 4096, 4096);
        assert!(found == pattern(queue as u64, 4096));
    }
}

//! Guests that break the rules of virtio: their queue stops, or the request fails, and
//! nothing else happens.

mod harness;

use harness::raw_guest::{
    DATA, HEADER, INDIRECT, INDIRECT_FLAG, MEMORY_BYTES, NEXT, QUEUE_SIZE, RawGuest, STATUS, TABLE,
    WRITE,
};
use harness::{Scene, pattern};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const INDIRECT_DESC: u64 = 1 << 28;

// Breaks the queue in one way, sees it announced, and uses the device again.
fn breaks(features: u64, set_up: impl Fn(&RawGuest)) {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, features);
    guest.header(IN, 0);
    set_up(&guest);
    guest.submit(0);
    guest.wait_broken();
    assert_eq!(guest.get(STATUS, 1), [0xee], "a broken chain was answered");
    assert!(backend.is_running());

    let base = guest.frontend_base();
    assert_eq!(base, 1, "the broken chain was consumed");
    guest.set_up_queue(base);
    guest.chain(IN, 0, (DATA, 512), true);
    assert_eq!(guest.perform(), (OK, 513));
}

#[test]
fn a_chain_that_loops_breaks_the_queue() {
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (DATA, 512, NEXT, 0));
    });
}

#[test]
fn a_next_index_outside_the_table_breaks_the_queue() {
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, QUEUE_SIZE));
    });
}

#[test]
fn a_chain_of_more_than_4_gib_breaks_the_queue() {
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (DATA, u32::MAX, NEXT | WRITE, 2));
        guest.descriptor(TABLE, 2, (STATUS, 1, WRITE, 0));
    });
}

#[test]
fn a_readable_buffer_after_a_writable_one_breaks_the_queue() {
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (STATUS, 1, NEXT | WRITE, 2));
        guest.descriptor(TABLE, 2, (DATA, 512, 0, 0));
    });
}

#[test]
fn a_request_without_header_or_status_breaks_the_queue() {
    breaks(0, |guest| guest.descriptor(TABLE, 0, (HEADER, 15, 0, 0)));
    breaks(0, |guest| guest.descriptor(TABLE, 0, (HEADER, 16, 0, 0)));
    breaks(0, |guest| guest.descriptor(TABLE, 0, (STATUS, 1, WRITE, 0)));
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (MEMORY_BYTES - 8, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (STATUS, 1, WRITE, 0));
    });
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (MEMORY_BYTES, 1, WRITE, 0));
    });
    breaks(0, |guest| {
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(TABLE, 1, (u64::MAX, 2, WRITE, 0));
    });
}

#[test]
fn indirect_tables_that_break_the_rules_break_the_queue() {
    let table = |len, flags| (INDIRECT, len, INDIRECT_FLAG | flags, 1);
    // Not negotiated.
    breaks(0, |guest| guest.descriptor(TABLE, 0, table(48, 0)));
    // With a next one.
    breaks(INDIRECT_DESC, |guest| {
        guest.descriptor(TABLE, 0, table(48, NEXT));
    });
    for len in [0, 8, 47, 16 * 1025, u32::MAX] {
        breaks(INDIRECT_DESC, |guest| {
            guest.descriptor(TABLE, 0, table(len, 0));
        });
    }
    // Inside another, which is itself.
    breaks(INDIRECT_DESC, |guest| {
        guest.descriptor(TABLE, 0, table(16, 0));
        guest.descriptor(INDIRECT, 0, table(16, 0));
    });
    // Outside memory, and across its end.
    for address in [MEMORY_BYTES, u64::MAX - 15, MEMORY_BYTES - 8] {
        breaks(INDIRECT_DESC, |guest| {
            guest.descriptor(TABLE, 0, (address, 48, INDIRECT_FLAG, 0));
        });
    }
    // A loop inside.
    breaks(INDIRECT_DESC, |guest| {
        guest.descriptor(TABLE, 0, table(32, 0));
        guest.descriptor(INDIRECT, 0, (HEADER, 16, NEXT, 1));
        guest.descriptor(INDIRECT, 1, (HEADER, 16, NEXT, 0));
    });
}

#[test]
fn an_available_index_that_runs_ahead_breaks_the_queue() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let guest = RawGuest::connect(&scene.socket, 0);
    guest.set_available_index(QUEUE_SIZE + 1);
    guest.kick.write(1).unwrap();
    guest.wait_broken();
    assert!(backend.is_running());
}

#[test]
fn a_head_outside_the_table_breaks_the_queue() {
    let scene = Scene::new(1 << 20);
    let mut backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.submit(QUEUE_SIZE);
    guest.wait_broken();
    assert!(backend.is_running());
}

#[test]
fn data_outside_guest_memory_fails_the_request_only() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(1, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    for address in [MEMORY_BYTES, MEMORY_BYTES - 256, u64::MAX - 255, 1 << 40] {
        for (kind, writable) in [(IN, true), (OUT, false)] {
            guest.chain(kind, 0, (address, 512), writable);
            assert_eq!(guest.perform(), (IOERR, 1), "{address:#x}");
        }
    }
    guest.chain(IN, 0, (DATA, 512), true);
    assert_eq!(guest.perform(), (OK, 513));
    assert!(guest.get(DATA, 512) == pattern(1, 512));
    assert!(scene.image_bytes(0, 1 << 20) == pattern(1, 1 << 20));
}

#[test]
fn what_the_device_may_only_read_is_never_written() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(1, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let own = pattern(9, 512);
    guest.put(DATA, &own);
    for kind in [IN, GET_ID] {
        // Nothing can be put there, so nothing is.
        guest.chain(kind, 0, (DATA, 512), false);
        let (_, len) = guest.perform();
        assert_eq!(len, 1, "{kind}");
        assert!(guest.get(DATA, 512) == own, "{kind}");
    }
    // And what it may write is not what it takes for a disk.
    guest.chain(OUT, 0, (DATA, 512), true);
    let (_, len) = guest.perform();
    assert_eq!(len, 1);
    assert!(guest.get(DATA, 512) == own);
    assert!(scene.image_bytes(0, 1 << 20) == pattern(1, 1 << 20));
}

#[test]
fn clause_2_7_4_1_header_and_status_may_be_framed_in_any_way() {
    let scene = Scene::new(1 << 20);
    scene.fill(1024, &pattern(2, 1024));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, INDIRECT_DESC);
    // The header in three pieces, and the status in one buffer with the data.
    guest.header(IN, 2);
    guest.descriptor(TABLE, 0, (HEADER, 3, NEXT, 1));
    guest.descriptor(TABLE, 1, (HEADER + 3, 12, NEXT, 2));
    guest.descriptor(TABLE, 2, (HEADER + 15, 1, NEXT, 3));
    guest.descriptor(TABLE, 3, (DATA, 100, NEXT | WRITE, 4));
    guest.descriptor(TABLE, 4, (DATA + 100, 925, WRITE, 0));
    guest.submit(0);
    assert_eq!(guest.wait_used(), (0, 1025));
    assert!(guest.get(DATA, 1024) == pattern(2, 1024));
    assert_eq!(guest.get(DATA + 1024, 1), [OK]);

    // Header and data in one buffer, in an indirect table.
    guest.header(OUT, 4);
    let written = pattern(3, 512);
    guest.put(HEADER + 16, &written);
    guest.descriptor(TABLE, 0, (INDIRECT, 32, INDIRECT_FLAG, 0));
    guest.descriptor(INDIRECT, 0, (HEADER, 16 + 512, NEXT, 1));
    guest.descriptor(INDIRECT, 1, (STATUS, 1, WRITE, 0));
    assert_eq!(guest.perform(), (OK, 1));
    assert!(scene.image_bytes(2048, 512) == written);
}

#[test]
fn clause_5_2_6_the_serial_number_fills_what_room_there_is() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&["--serial", "disk-of-web"]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.put(DATA, &[0xee; 32]);
    guest.chain(GET_ID, 0, (DATA, 20), true);
    assert_eq!(guest.perform(), (OK, 21));
    assert_eq!(&guest.get(DATA, 21), b"disk-of-web\0\0\0\0\0\0\0\0\0\xee");
    guest.put(DATA, &[0xee; 32]);
    guest.chain(GET_ID, 0, (DATA, 4), true);
    assert_eq!(guest.perform(), (OK, 5));
    assert_eq!(&guest.get(DATA, 5), b"disk\xee");
}

#[test]
fn clause_5_2_6_flush_and_unknown_types_are_answered() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    guest.descriptor(TABLE, 1, (STATUS, 1, WRITE, 0));
    // A discard without ranges is an error of a known type.
    for (kind, status) in [(FLUSH, OK), (3, UNSUPP), (11, IOERR), (u32::MAX, UNSUPP)] {
        guest.header(kind, 0);
        guest.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        assert_eq!(guest.perform(), (status, 1), "type {kind}");
    }
}

#[test]
fn clause_5_2_4_the_write_cache_can_be_switched_in_the_configuration() {
    const CONFIG_WCE: u64 = 1 << 11;
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 1 << 9 | CONFIG_WCE);
    assert_eq!(guest.config(32, 1), [1]);
    guest.set_config(32, &[0]);
    assert_eq!(guest.config(32, 1), [0]);
    // Anything else is the driver's mistake and changes nothing.
    let before = guest.config(0, 60);
    guest.set_config(0, &[0; 8]);
    guest.set_config(32, &[7]);
    assert_eq!(guest.config(0, 60), before);
}

//! vhost-user's protocol features, as a frontend uses them.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use harness::raw_guest::{DATA, RawGuest, STATUS};
use harness::{Scene, pattern};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

const READ: u32 = 0;
const LOG_ALL: u64 = 1 << 26;

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let mut bytes = request.to_le_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn answer(connection: &mut UnixStream) -> (u32, u64) {
    let mut bytes = [0; 20];
    connection.read_exact(&mut bytes).unwrap();
    let request = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    (request, u64::from_le_bytes(bytes[12..].try_into().unwrap()))
}

#[test]
fn the_device_status_is_kept_and_0_resets_the_device() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut connection = UnixStream::connect(&scene.socket).unwrap();
    let status = VhostUserProtocolFeatures::STATUS | VhostUserProtocolFeatures::REPLY_ACK;
    connection.write_all(&message(1, 1, &[])).unwrap();
    let features = answer(&mut connection).1;
    let set = message(2, 1, &features.to_le_bytes());
    connection.write_all(&set).unwrap();
    let protocol = message(16, 1, &status.bits().to_le_bytes());
    connection.write_all(&protocol).unwrap();
    for value in [0_u64, 1, 3, 11, 15] {
        // With an answer asked for.
        connection
            .write_all(&message(39, 1 | 8, &value.to_le_bytes()))
            .unwrap();
        assert_eq!(answer(&mut connection), (39, 0));
        connection.write_all(&message(40, 1, &[])).unwrap();
        assert_eq!(answer(&mut connection), (40, value));
    }
    connection
        .write_all(&message(39, 1, &0_u64.to_le_bytes()))
        .unwrap();
    connection.write_all(&message(40, 1, &[])).unwrap();
    assert_eq!(answer(&mut connection), (40, 0));
}

#[test]
fn a_disk_that_has_grown_is_announced_and_has_its_new_size() {
    let scene = Scene::new(1 << 20);
    let backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ));
    guest.frontend.set_protocol_features(protocol).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    guest.chain(READ, 2048, (DATA, 512), true);
    assert_eq!(guest.perform().0, 1, "beyond the end");

    let image = File::options().write(true).open(&scene.image).unwrap();
    image.set_len(2 << 20).unwrap();
    backend.signal(rustix::process::Signal::HUP);
    let mut notice = [0; 12];
    ours.read_exact(&mut notice).unwrap();
    assert_eq!(notice, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(0, 8), 4096_u64.to_le_bytes());
    guest.chain(READ, 2048, (DATA, 512), true);
    assert_eq!(guest.perform().0, 0);
}

#[test]
fn pages_that_reads_write_are_in_the_dirty_log() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(1, 1 << 20));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect_without_queue(&scene.socket, LOG_ALL);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    guest.frontend.set_protocol_features(protocol).unwrap();
    let log = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
    log.set_len(4096).unwrap();
    let region = VhostUserDirtyLogRegion {
        mmap_size: 4096,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    guest.frontend.set_log_base(0, Some(region)).unwrap();
    guest.set_up_queue(0);
    guest.chain(READ, 0, (DATA + 4096, 8192), true);
    assert_eq!(guest.perform(), (0, 8193));
    let mut bits = [0; 8];
    log.read_exact_at(&mut bits, 0).unwrap();
    let bits = u64::from_le_bytes(bits);
    let page = |address: u64| bits >> (address / 4096) & 1;
    assert_eq!(
        (page(DATA), page(DATA + 4096), page(DATA + 8192)),
        (0, 1, 1)
    );
    assert_eq!((page(DATA + 12288), page(STATUS)), (0, 1));
}

#[test]
fn memory_comes_and_goes_by_regions_while_queues_run() {
    const MIB: u64 = 1 << 20;
    let scene = Scene::new(MIB);
    scene.fill(0, &pattern(1, 8192));
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    guest.frontend.set_protocol_features(protocol).unwrap();
    let mut frontend = guest.frontend.clone();
    let slots = frontend.get_max_mem_slots().unwrap();
    let more = File::from(memfd_create("more", MemfdFlags::CLOEXEC).unwrap());
    more.set_len(slots * MIB).unwrap();
    // Behind the guest's own memory, a hole between each and the next.
    let region = |slot: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: (1 << 30) + slot * 2 * MIB,
        memory_size: MIB,
        userspace_addr: (1 << 40) + slot * 2 * MIB,
        mmap_offset: slot * MIB,
        mmap_handle: more.as_raw_fd(),
    };
    let mut read_to = |slot: u64| {
        guest.chain(READ, 8, (region(slot).guest_phys_addr, 4096), true);
        guest.perform().0
    };
    assert_eq!(read_to(0), 1, "it isn't there yet");
    // The table has one already.
    for slot in 0..slots - 1 {
        frontend.add_mem_region(&region(slot)).unwrap();
    }
    let content = pattern(1, 8192);
    for slot in [0, 1, slots - 2] {
        assert_eq!(read_to(slot), 0, "{slot}");
        let mut found = vec![0; 4096];
        more.read_exact_at(&mut found, slot * MIB).unwrap();
        assert!(found == content[4096..], "{slot}");
    }
    frontend.remove_mem_region(&region(1)).unwrap();
    assert_eq!([0, 1, 2].map(&mut read_to), [0, 1, 0]);
    frontend.add_mem_region(&region(slots - 1)).unwrap();
    assert_eq!([1, slots - 1].map(&mut read_to), [1, 0]);
    // One too many, or one that isn't there, ends the connection as other nonsense does.
    assert!(frontend.add_mem_region(&region(1)).is_err());
    drop(guest);
    let guest = RawGuest::connect(&scene.socket, 0);
    let mut frontend = guest.frontend.clone();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    assert!(frontend.remove_mem_region(&region(1)).is_err());
}

#[test]
fn a_reset_device_can_be_set_up_again() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 0);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    guest.frontend.set_protocol_features(protocol).unwrap();
    guest.chain(READ, 0, (DATA, 512), true);
    assert_eq!(guest.perform(), (0, 513));
    guest.frontend.reset_device().unwrap();
    guest.frontend.set_features(1 << 30 | 1 << 32).unwrap();
    guest.set_up_queue(1);
    assert_eq!(guest.perform(), (0, 513));
}

#[test]
fn the_cache_mode_goes_with_a_guest_that_migrates() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut guest = RawGuest::connect(&scene.socket, 1 << 9 | 1 << 11);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    guest.frontend.set_protocol_features(protocol).unwrap();
    guest.set_config(32, &[0]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let stopped = VhostTransferStatePhase::STOPPED;
    let save = VhostTransferStateDirection::SAVE;
    let kept = guest
        .frontend
        .set_device_state_fd(save, stopped, writer.into())
        .unwrap();
    assert!(kept.is_none());
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    guest.frontend.check_device_state().unwrap();

    guest.set_config(32, &[1]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let load = VhostTransferStateDirection::LOAD;
    guest
        .frontend
        .set_device_state_fd(load, stopped, reader.into())
        .unwrap();
    writer.write_all(&state).unwrap();
    drop(writer);
    guest.frontend.check_device_state().unwrap();
    assert_eq!(guest.config(32, 1), [0]);
}

//! A guest without a driver: it writes descriptors and rings byte by byte, right or wrong.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PATIENCE;

pub const MEMORY_BYTES: u64 = 4 << 20;
pub const QUEUE_SIZE: u16 = 16;

// Guest physical addresses. Everything from DATA on is the tests'.
pub const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
pub const HEADER: u64 = 0x4000;
pub const STATUS: u64 = 0x5000;
pub const INDIRECT: u64 = 0x6000;
pub const DATA: u64 = 0x10000;

// Not the guest address and not the mapping's, so that mixing them up shows.
const FRONTEND_ADDRESS: u64 = 0x7000_0000_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_FLAG: u16 = 4;

/// The protocol features that the guest takes.
pub const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MQ);

pub struct RawGuest {
    pub frontend: Frontend,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    memory: MmapRegion,
    memory_file: RawFd,
    next_available: u16,
    used_seen: u16,
}

impl RawGuest {
    /// Connects and sets up queue 0, ready to be used.
    pub fn connect(socket: &Path, features: u64) -> Self {
        let mut guest = Self::connect_without_queue(socket, features);
        guest.set_up_queue(0);
        guest
    }

    /// Connects, negotiates and shares the memory.
    pub fn connect_without_queue(socket: &Path, features: u64) -> Self {
        let mut frontend = Frontend::connect(socket, 64).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        frontend
            .set_features(offered & (features | 1 << 30 | 1 << 32))
            .unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol & PROTOCOL).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES).unwrap();
        let descriptor = file.as_raw_fd();
        let size = usize::try_from(MEMORY_BYTES).unwrap();
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), size).unwrap();
        let guest = Self {
            frontend,
            memory_file: descriptor,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            error: EventFd::new(EFD_NONBLOCK).unwrap(),
            memory,
            next_available: 0,
            used_seen: 0,
        };
        guest.share_memory();
        guest
    }

    /// Shares the memory, perhaps again.
    pub fn share_memory(&self) {
        self.frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: MEMORY_BYTES,
                userspace_addr: FRONTEND_ADDRESS,
                mmap_offset: 0,
                mmap_handle: self.memory_file,
            }])
            .unwrap();
    }

    /// Stops queue 0 and returns the available index that it got to.
    pub fn frontend_base(&mut self) -> u16 {
        let base = self.frontend.get_vring_base(0).unwrap();
        u16::try_from(base).unwrap()
    }

    /// Shortens the file behind the memory. Nothing here may touch the memory afterwards.
    pub fn cut_memory_off(&self) {
        // SAFETY: the mapping keeps the descriptor open.
        let file = unsafe { BorrowedFd::borrow_raw(self.memory_file) };
        rustix::fs::ftruncate(file, 0).unwrap();
    }

    /// The file behind the memory, which a thread may write to meanwhile.
    pub fn memory_file(&self) -> File {
        // SAFETY: the mapping keeps the descriptor open.
        let file = unsafe { BorrowedFd::borrow_raw(self.memory_file) };
        file.try_clone_to_owned().unwrap().into()
    }

    /// Gives queue 0 any descriptor as its kick.
    pub fn set_kick_to(&self, descriptor: RawFd) {
        // SAFETY: dup has no preconditions, and the copy is owned here alone.
        let eventfd = unsafe { EventFd::from_raw_fd(libc::dup(descriptor)) };
        let _ = self.frontend.set_vring_kick(0, &eventfd);
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.set_config(offset, flags, bytes).unwrap();
    }

    pub fn set_up_queue(&mut self, base: u16) {
        self.frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
        self.frontend
            .set_vring_addr(0, &Self::ring_addresses())
            .unwrap();
        self.frontend.set_vring_base(0, base).unwrap();
        self.frontend.set_vring_err(0, &self.error).unwrap();
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    pub fn ring_addresses() -> VringConfigData {
        VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: FRONTEND_ADDRESS + TABLE,
            used_ring_addr: FRONTEND_ADDRESS + USED,
            avail_ring_addr: FRONTEND_ADDRESS + AVAILABLE,
            log_addr: None,
        }
    }

    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        let size = u32::try_from(len).unwrap();
        self.frontend
            .get_config(offset, size, flags, &vec![0; len])
            .unwrap()
            .1
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        let place = usize::try_from(address).unwrap();
        assert!(place + bytes.len() <= self.memory.size());
        // SAFETY: within the mapping; the backend is told of the bytes only afterwards.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.memory.as_ptr().add(place),
                bytes.len(),
            );
        }
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let place = usize::try_from(address).unwrap();
        assert!(place + len <= self.memory.size());
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping; the backend has handed the bytes back.
        unsafe {
            std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(place), bytes.as_mut_ptr(), len);
        }
        bytes
    }

    /// Writes a `struct virtq_desc`.
    pub fn descriptor(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        self.put(table + u64::from(index) * 16, &descriptor_bytes(fields));
    }

    /// Writes a `struct virtio_blk_req` header, and a status that no device gives.
    pub fn header(&self, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&sector.to_le_bytes());
        self.put(HEADER, &bytes);
        self.put(STATUS, &[0xee]);
    }

    /// The usual chain in descriptors 0 to 2: header, data, status.
    pub fn chain(&self, kind: u32, sector: u64, data: (u64, u32), writable: bool) {
        self.header(kind, sector);
        let direction = if writable { WRITE } else { 0 };
        self.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
        self.descriptor(TABLE, 1, (data.0, data.1, NEXT | direction, 2));
        self.descriptor(TABLE, 2, (STATUS, 1, WRITE, 0));
    }

    fn index(&self, address: u64) -> &AtomicU16 {
        let place = usize::try_from(address).unwrap();
        // SAFETY: within the mapping, aligned, and only accessed atomically on both sides.
        unsafe { AtomicU16::from_ptr(self.memory.as_ptr().add(place).cast()) }
    }

    pub fn set_available_index(&self, index: u16) {
        self.index(AVAILABLE + 2).store(index, Ordering::Release);
    }

    /// Makes a chain available and kicks.
    pub fn submit(&mut self, head: u16) {
        let slot = u64::from(self.next_available % QUEUE_SIZE);
        self.put(AVAILABLE + 4 + slot * 2, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
        self.kick.write(1).unwrap();
    }

    /// Waits for the next used chain and returns its head and length.
    pub fn wait_used(&mut self) -> (u32, u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.index(USED + 2).load(Ordering::Acquire) == self.used_seen {
            assert!(Instant::now() < deadline, "the request never completes");
            std::thread::sleep(Duration::from_micros(200));
        }
        let slot = u64::from(self.used_seen % QUEUE_SIZE);
        self.used_seen = self.used_seen.wrapping_add(1);
        let element = self.get(USED + 4 + slot * 8, 8);
        let (head, len) = element.split_at(4);
        (
            u32::from_le_bytes(head.try_into().unwrap()),
            u32::from_le_bytes(len.try_into().unwrap()),
        )
    }

    /// Waits until the next chain is used, or the queue is announced broken. Whether it was used.
    pub fn wait_used_or_broken(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.index(USED + 2).load(Ordering::Acquire) != self.used_seen {
                self.wait_used();
                return true;
            }
            if self.error.read().is_ok() {
                return false;
            }
            assert!(Instant::now() < deadline, "the request never ends");
            std::thread::yield_now();
        }
    }

    /// Submits descriptor 0 and returns the status byte and the used length.
    pub fn perform(&mut self) -> (u8, u32) {
        self.submit(0);
        let (head, len) = self.wait_used();
        assert_eq!(head, 0);
        (self.get(STATUS, 1)[0], len)
    }

    /// Waits until the backend has announced that the queue is broken.
    pub fn wait_broken(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.error.read().is_err() {
            assert!(
                Instant::now() < deadline,
                "the queue isn't announced broken"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// A `struct virtq_desc` of an address, a length, flags and a next index.
pub fn descriptor_bytes((address, len, flags, next): (u64, u32, u16, u16)) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&next.to_le_bytes());
    bytes
}

//! A guest that outlives its backends: its memory, its rings and the memory of what is in flight
//! stay, as a VMM keeps them, while backends come and go.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PATIENCE;

pub const QUEUE_SIZE: u16 = 64;
/// Requests that fit at once: each takes three descriptors.
pub const SLOTS: usize = 21;
pub const BLOCK: usize = 4096;

const TABLE: usize = 0;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const HEADERS: usize = 0x4000;
const STATUSES: usize = 0x5000;
const DATA: usize = 0x10000;
const MEMORY_BYTES: usize = DATA + SLOTS * BLOCK;
const FRONTEND_ADDRESS: u64 = 0x7000_0000_0000;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;

pub struct SteadyGuest {
    memory_file: File,
    memory: MmapRegion,
    kick: EventFd,
    call: EventFd,
    inflight: Option<(VhostUserInflight, File)>,
    connection: Option<Frontend>,
    available: u16,
    used: u16,
    /// Which slots are with the device.
    busy: [bool; SLOTS],
}

impl SteadyGuest {
    pub fn new() -> Self {
        let memory_file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory_file.set_len(MEMORY_BYTES as u64).unwrap();
        let clone = memory_file.try_clone().unwrap();
        let memory = MmapRegion::from_file(FileOffset::new(clone, 0), MEMORY_BYTES).unwrap();
        let guest = Self {
            memory_file,
            memory,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            inflight: None,
            connection: None,
            available: 0,
            used: 0,
            busy: [false; SLOTS],
        };
        for slot in 0..SLOTS {
            guest.descriptor(slot * 3, HEADERS + slot * 16, 16, 1);
            guest.descriptor(slot * 3 + 2, STATUSES + slot, 1, 2);
        }
        guest
    }

    /// Connects to a backend, the first or the next one. Fails if the backend dies meanwhile.
    pub fn connect(&mut self, socket: &Path) -> vhost::Result<()> {
        self.connection = None;
        let mut frontend = Frontend::connect(socket, 1)?;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        frontend.set_features(offered & (EVENT_IDX | PROTOCOL_FEATURES | VERSION_1 | FLUSH))?;
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIG;
        let protocol = frontend.get_protocol_features()?;
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if self.inflight.is_none() {
            let wanted = VhostUserInflight::new(0, 0, 1, QUEUE_SIZE);
            self.inflight = Some(frontend.get_inflight_fd(&wanted)?);
        }
        let (description, file) = self.inflight.as_ref().unwrap();
        frontend.set_inflight_fd(description, file.as_raw_fd())?;
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: FRONTEND_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.memory_file.as_raw_fd(),
        }])?;
        frontend.set_vring_num(0, QUEUE_SIZE)?;
        frontend.set_vring_addr(
            0,
            &VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: FRONTEND_ADDRESS + TABLE as u64,
                used_ring_addr: FRONTEND_ADDRESS + USED as u64,
                avail_ring_addr: FRONTEND_ADDRESS + AVAILABLE as u64,
                log_addr: None,
            },
        )?;
        frontend.set_vring_base(0, self.index(USED + 2).load(Ordering::Acquire))?;
        frontend.set_vring_call(0, &self.call)?;
        frontend.set_vring_kick(0, &self.kick)?;
        frontend.set_vring_enable(0, true)?;
        self.kick.write(1).unwrap();
        self.connection = Some(frontend);
        Ok(())
    }

    /// Stops the queue as a VMM does that hands over to the next backend.
    pub fn stop_queue(&mut self) -> u32 {
        let frontend = self.connection.as_ref().unwrap();
        frontend.get_vring_base(0).unwrap()
    }

    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    pub fn free_slot(&self) -> Option<usize> {
        self.busy.iter().position(|busy| !busy)
    }

    pub fn busy(&self) -> usize {
        self.busy.iter().filter(|busy| **busy).count()
    }

    /// Makes a request available: its type, its first sector, and its data or its length.
    pub fn submit(&mut self, slot: usize, kind: u32, sector: u64, data: Result<&[u8], usize>) {
        assert!(!std::mem::replace(&mut self.busy[slot], true));
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        self.put(HEADERS + slot * 16, &header);
        self.put(STATUSES + slot, &[0xee]);
        let place = DATA + slot * BLOCK;
        let (len, flags) = match data {
            Ok(bytes) => {
                self.put(place, bytes);
                (bytes.len(), 1)
            }
            Err(len) => (len, 1 | 2),
        };
        self.descriptor(slot * 3 + 1, place, len, flags);
        let head = u16::try_from(slot * 3).unwrap();
        let ring = usize::from(self.available % QUEUE_SIZE);
        self.put(AVAILABLE + 4 + ring * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        let index = self.index(AVAILABLE + 2);
        index.store(self.available, Ordering::Release);
        self.kick.write(1).unwrap();
    }

    /// The requests that were handed back: slot, status and data.
    pub fn completed(&mut self) -> Vec<(usize, u8, Vec<u8>)> {
        let mut done = Vec::new();
        while self.index(USED + 2).load(Ordering::Acquire) != self.used {
            let place = USED + 4 + usize::from(self.used % QUEUE_SIZE) * 8;
            let head = u32::from_le_bytes(self.get(place, 4).try_into().unwrap());
            let slot = usize::try_from(head).unwrap() / 3;
            assert!(head.is_multiple_of(3), "no head of a chain: {head}");
            assert!(
                std::mem::replace(&mut self.busy[slot], false),
                "a request was handed back twice"
            );
            self.used = self.used.wrapping_add(1);
            let status = self.get(STATUSES + slot, 1)[0];
            done.push((slot, status, self.get(DATA + slot * BLOCK, BLOCK)));
        }
        // Asks for an interrupt after the next one.
        self.index(AVAILABLE + 4 + 2 * usize::from(QUEUE_SIZE))
            .store(self.used, Ordering::SeqCst);
        done
    }

    /// Waits a moment for the device's interrupt. The next look may find nothing.
    pub fn wait(&self) {
        // SAFETY: the eventfd is open as long as the guest.
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut sources = [PollFd::new(&call, PollFlags::IN)];
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let _ = poll(&mut sources, Some(&moment));
        let _ = self.call.read();
    }

    /// Waits until nothing is with the device.
    pub fn finish(&mut self) -> Vec<(usize, u8, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        loop {
            done.extend(self.completed());
            if self.busy() == 0 {
                return done;
            }
            assert!(Instant::now() < deadline, "requests were lost");
            self.wait();
        }
    }

    fn descriptor(&self, index: usize, address: usize, len: usize, flags: u16) {
        let mut bytes = (address as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&u16::try_from(index + 1).unwrap().to_le_bytes());
        self.put(TABLE + index * 16, &bytes);
    }

    fn index(&self, place: usize) -> &AtomicU16 {
        // SAFETY: within the mapping, aligned, and only accessed atomically on both sides.
        unsafe { AtomicU16::from_ptr(self.memory.as_ptr().add(place).cast()) }
    }

    fn put(&self, place: usize, bytes: &[u8]) {
        assert!(place + bytes.len() <= MEMORY_BYTES);
        let target = self.memory.as_ptr().wrapping_add(place);
        // SAFETY: within the mapping, and not with the device.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    fn get(&self, place: usize, len: usize) -> Vec<u8> {
        assert!(place + len <= MEMORY_BYTES);
        let mut bytes = vec![0; len];
        let source = self.memory.as_ptr().wrapping_add(place);
        // SAFETY: within the mapping, and handed back by the device.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), len) };
        bytes
    }
}

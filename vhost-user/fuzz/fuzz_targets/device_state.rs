//! The state of a device from another host: any bytes in any kind of file.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use keelson_blk::backend::BlockBackend;
use keelson_blk::device::VirtioBlock;
use keelson_blk::disk::Disk;
use keelson_blk::layer::null::NullDevice;
use keelson_blk::metrics::QueueMetrics;
use keelson_blk::worker::{WorkerOptions, WorkerPool};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

fn workers() -> Arc<WorkerPool> {
    static WORKERS: OnceLock<Arc<WorkerPool>> = OnceLock::new();
    Arc::clone(WORKERS.get_or_init(|| WorkerPool::new(WorkerOptions::default())))
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, content)) = input.split_first() else {
        return;
    };
    let disk = Arc::new(Disk::new(Arc::new(NullDevice::new(1 << 20)), [0; 20]));
    let metrics = [Arc::<QueueMetrics>::default()];
    let device = VirtioBlock::new(disk, workers(), 1024, &metrics);
    let mut backend = BlockBackend::new(device);
    let mut kept_open = None;
    let file = match kind % 3 {
        // A pipe whose other end is closed, one whose isn't, and a file.
        0 | 1 => {
            let (reader, mut writer) = std::io::pipe().expect("a pipe");
            let content = &content[..content.len().min(60 << 10)];
            writer.write_all(content).expect("room");
            kept_open = Some(writer).filter(|_| kind % 3 == 1);
            File::from(std::os::fd::OwnedFd::from(reader))
        }
        _ => {
            let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC).expect("a memfd"));
            file.write_all(content).expect("room");
            seek(&file, SeekFrom::Start(0)).expect("the start");
            file
        }
    };
    let phase = VhostTransferStatePhase::STOPPED;
    let load = VhostTransferStateDirection::LOAD;
    if backend.set_device_state_fd(load, phase, file).is_ok() {
        let _ = backend.check_device_state();
    }
    drop(kept_open);
    // What it says of itself is what it would take.
    let state = File::from(memfd_create("state", MemfdFlags::CLOEXEC).expect("a memfd"));
    let save = VhostTransferStateDirection::SAVE;
    let copy = state.try_clone().expect("a copy");
    backend.set_device_state_fd(save, phase, copy).expect("a state");
    seek(&state, SeekFrom::Start(0)).expect("the start");
    backend.set_device_state_fd(load, phase, state).expect("a file");
    backend.check_device_state().expect("its own state");
});

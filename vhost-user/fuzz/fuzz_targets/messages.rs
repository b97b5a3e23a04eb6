//! The frontend's side: any sequence of vhost-user messages with any bodies and with
//! descriptors of several kinds. The device behind it is the real one, with workers and rings.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};

use keelson_blk::backend::BlockBackend;
use keelson_blk::device::VirtioBlock;
use keelson_blk::disk::Disk;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::layer::file::FileDevice;
use keelson_blk::metrics::QueueMetrics;
use keelson_blk::protocol_extension::{self, Outcome};
use keelson_blk::worker::{WorkerOptions, WorkerPool};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::BackendReqHandler;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MESSAGES: usize = 24;

struct Descriptors {
    memory: File,
    event: std::os::fd::OwnedFd,
    null: File,
}

fn descriptors() -> &'static Descriptors {
    static DESCRIPTORS: OnceLock<Descriptors> = OnceLock::new();
    DESCRIPTORS.get_or_init(|| {
        let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
        let memory = File::from(memory);
        memory.set_len(1 << 16).expect("64 KiB");
        Descriptors {
            memory,
            event: eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
            null: File::open("/dev/null").expect("/dev/null"),
        }
    })
}

fn workers() -> Arc<WorkerPool> {
    static WORKERS: OnceLock<Arc<WorkerPool>> = OnceLock::new();
    Arc::clone(WORKERS.get_or_init(|| WorkerPool::new(WorkerOptions::default())))
}

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
        Arc::new(Disk::new(Arc::new(file), [0; 20]))
    }))
}

// One message: request, flags, number and kind of descriptors, body length, body.
fn send<'a>(socket: &UnixStream, input: &'a [u8]) -> Option<&'a [u8]> {
    let (&[request, flags, attached, len], rest) = input.split_first_chunk::<4>()?;
    let (body, rest) = rest.split_at(usize::from(len).min(rest.len()));
    let mut bytes = u32::from(request % 48).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(u32::from(flags & 0xc) | 1).to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).ok()?.to_le_bytes());
    bytes.extend_from_slice(body);
    let all = descriptors();
    let kinds: [RawFd; 4] = [
        all.memory.as_raw_fd(),
        all.event.as_raw_fd(),
        all.null.as_raw_fd(),
        all.memory.as_raw_fd(),
    ];
    let kind = kinds[usize::from(attached >> 4 & 3)];
    let attachments = vec![kind; usize::from(attached & 3)];
    socket.send_with_fds(&[&bytes[..]], &attachments).ok()?;
    Some(rest)
}

fuzz_target!(|input: &[u8]| {
    let Ok((frontend, backend)) = UnixStream::pair() else {
        return;
    };
    let Ok(connection) = backend.try_clone() else {
        return;
    };
    let metrics = [
        Arc::<QueueMetrics>::default(),
        Arc::<QueueMetrics>::default(),
    ];
    let device = VirtioBlock::new(disk(), workers(), 1024, &metrics);
    let device = Arc::new(Mutex::new(BlockBackend::new(device)));
    let mut handler = BackendReqHandler::from_stream(backend, Arc::clone(&device));
    // Replies must never fill the socket's buffer, or nobody would go on.
    let mut rest = Some(input);
    for _ in 0..MESSAGES {
        rest = rest.and_then(|rest| send(&frontend, rest));
        if rest.is_none() {
            break;
        }
        // As the server does.
        let outcome = {
            let mut backend = device.lock().expect("no panic before");
            protocol_extension::handle(&connection, &mut backend)
        };
        match outcome {
            Ok(Outcome::NotMine) if handler.handle_request().is_err() => break,
            Ok(Outcome::Notices(notices)) => {
                let _ = notices.config_changed();
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    drop(handler);
    device.lock().expect("no panic before").stop();
});

//! What keeps a killed process from losing what it acknowledged.
//!
//! A guest's writes that were never flushed may be lost with the machine's power, but not with
//! keelson-blk: the guest goes on and believes in them. Their data is safe with the kernel, but
//! the bits that point to it are in the file only after a flush. So each bit is also noted, as a
//! byte, in a file on a tmpfs, which outlives processes and ends with the machine, exactly as
//! unflushed data does. A process that ends in order removes its file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, fstatfs, seek};
use uuid::Uuid;

const MAGIC: [u8; 8] = *b"KEELSESS";
const HEADER_BYTES: u64 = 4096;
/// `TMPFS_MAGIC` (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;
/// Where sessions are, the first that is on a tmpfs and can be written to.
const FOLDERS: [&str; 2] = ["/run/keelson-blk", "/dev/shm/keelson-blk"];

/// Which file, as of which opening for writing. A copy, or a file that others have written to
/// meanwhile, is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file's own name for itself.
    pub uuid: Uuid,
    /// How often it has been opened for writing.
    pub opened: u64,
    /// Its device and inode.
    pub inode: (u64, u64),
}

/// An open session of one writer.
#[derive(Debug)]
pub struct Session {
    file: File,
    path: PathBuf,
}

/// The folder for sessions; none if there is no tmpfs that this process may write to.
pub fn folder() -> Option<PathBuf> {
    FOLDERS.iter().map(PathBuf::from).find(|path| {
        let _ = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        let kind = File::open(path).and_then(|folder| Ok(fstatfs(&folder)?.f_type));
        let ours = fs::metadata(path)
            .is_ok_and(|folder| folder.uid() == rustix::process::geteuid().as_raw());
        // Another user's folder could hold anything.
        ours && kind.is_ok_and(|kind| kind == TMPFS)
    })
}

/// The stripes that a killed writer has noted, if it was the file's last one.
pub fn left_behind(folder: &Path, identity: &Identity) -> io::Result<Vec<u64>> {
    let mut file = match File::open(path(folder, identity.uuid)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut header = [0; 48];
    if file.read_exact(&mut header).is_err() || header != encode(identity) {
        tracing::warn!(
            image = %identity.uuid,
            "what an earlier process noted is of another state of the image, and is not used"
        );
        return Ok(Vec::new());
    }
    let mut stripes = Vec::new();
    let mut place = HEADER_BYTES;
    let mut bytes = vec![0; 64 << 10];
    loop {
        place = match seek(&file, SeekFrom::Data(place)) {
            Ok(place) => place,
            Err(rustix::io::Errno::NXIO) => return Ok(stripes),
            Err(error) => return Err(error.into()),
        };
        let count = file.read_at(&mut bytes, place)?;
        if count == 0 {
            return Ok(stripes);
        }
        let noted = (place - HEADER_BYTES..).zip(bytes.iter().take(count));
        stripes.extend(
            noted
                .filter(|(_, byte)| **byte != 0)
                .map(|(stripe, _)| stripe),
        );
        place += count as u64;
    }
}

impl Session {
    /// Begins a session, in place of an earlier one.
    pub fn begin(folder: &Path, identity: &Identity) -> io::Result<Self> {
        let path = path(folder, identity.uuid);
        let new = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all_at(&encode(identity), 0)?;
        fs::rename(&new, &path)?;
        Ok(Self { file, path })
    }

    /// Notes that a stripe is in the file.
    pub fn note(&self, stripe: u64) -> io::Result<()> {
        self.file.write_all_at(&[1], HEADER_BYTES + stripe)
    }

    /// Ends the session: everything that was noted is durable.
    pub fn end(&self) {
        // If it stays, it only says what the map says as well.
        let _ = fs::remove_file(&self.path);
    }
}

fn path(folder: &Path, uuid: Uuid) -> PathBuf {
    folder.join(format!("{uuid}.session"))
}

fn encode(identity: &Identity) -> [u8; 48] {
    let mut header = [0; 48];
    header[..8].copy_from_slice(&MAGIC);
    header[8..24].copy_from_slice(identity.uuid.as_bytes());
    header[24..32].copy_from_slice(&identity.opened.to_le_bytes());
    header[32..40].copy_from_slice(&identity.inode.0.to_le_bytes());
    header[40..48].copy_from_slice(&identity.inode.1.to_le_bytes());
    header
}

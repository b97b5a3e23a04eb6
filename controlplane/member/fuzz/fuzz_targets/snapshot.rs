//! What another member streams: chunks with right checksums and any bodies. They are loaded or
//! refused, and what is loaded can be opened and read.
#![no_main]

use std::sync::Arc;

use keelson_member::Limits;
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::{Keyspace, SnapshotWriter};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bodies: Vec<Vec<u8>>| {
    let folder = tempfile::tempdir().expect("a folder");
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).expect("it opens"));
    let mut writer = SnapshotWriter::new(Arc::clone(&disk), 1).expect("a new file");
    for (number, body) in bodies.iter().enumerate() {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&(number as u64).to_le_bytes());
        hasher.update(body);
        let length = u32::try_from(body.len()).expect("it is short");
        let mut chunk = length.to_le_bytes().to_vec();
        chunk.extend(hasher.finalize().to_le_bytes());
        chunk.extend(body);
        if writer.push(&chunk).is_err() {
            return;
        }
    }
    let Ok(staged) = writer.finish() else {
        return;
    };
    let metadata = staged.metadata().clone();
    if staged.restore(&*disk, &metadata).is_err() {
        return;
    }
    if let Ok(keyspace) = Keyspace::open(&*disk, 1 << 20, None, Limits::default()) {
        let _ = keyspace.hash(0);
        let _ = keyspace.history(0, |_| true);
        let _ = keyspace.clear_compacted();
    }
});

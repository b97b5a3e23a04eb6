//! The loader of snapshots' state files: any bytes, and any body behind a valid header, are refused or
//! give a state that is consistent in itself.

#![no_main]

use keelson_vmm::snapshot::SnapshotState;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = SnapshotState::decode(bytes);
    let mut file = Vec::with_capacity(32 + bytes.len());
    file.extend_from_slice(b"KEELSNAP");
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&62u32.to_le_bytes());
    file.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    file.extend_from_slice(&crc32fast::hash(bytes).to_le_bytes());
    let header = crc32fast::hash(&file);
    file.extend_from_slice(&header.to_le_bytes());
    file.extend_from_slice(bytes);
    if let Ok(state) = SnapshotState::decode(&file) {
        assert!(state.config().is_ok());
    }
});

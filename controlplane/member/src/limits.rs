/// Sizes at which a member begins something new. The defaults are a server's; a simulation sets small
/// ones, so that its short runs reach all of them.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a segment of the log, but for one whose only frame is larger. Whole MiB, or less
    /// than one.
    pub segment_bytes: u64,
    /// Segments that are kept for followers that are behind.
    pub segments: usize,
    /// Entries of the log that are also in memory, in bytes: what followers that keep up are sent.
    pub log_cache_bytes: usize,
    /// Log entries that are kept for followers that are behind, beyond what the keyspace needs.
    pub kept_entries: u64,
    /// Bytes of changes from which on a flush is worth it; at 16 times as many, the disk is too slow
    /// for what is wanted of it.
    pub flush_bytes: usize,
    /// Records that one transaction of the storage engine looks at while it compacts.
    pub compaction_batch: usize,
    /// Changes that are read at once for a watch that is behind.
    pub history_changes: usize,
    /// Their bytes.
    pub history_bytes: usize,
    /// Deliveries that wait in one stream of watches before they fall behind.
    pub queued_deliveries: usize,
    /// Bytes to which a chunk of a snapshot grows.
    pub chunk_bytes: usize,
    /// Blocks of the keyspace that are verified each time maintenance has nothing else to do: at a
    /// server's ten times a second, 2.5 MiB a second.
    pub verify_blocks: u64,
    /// Times that maintenance has nothing else to do between two passes of verification: ten minutes
    /// of a server's.
    pub verify_pause: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            segment_bytes: 16 * 1024 * 1024,
            segments: 64,
            log_cache_bytes: 4 * 1024 * 1024,
            kept_entries: 5000,
            flush_bytes: 8 * 1024 * 1024,
            compaction_batch: 2000,
            history_changes: 1000,
            history_bytes: 1024 * 1024,
            queued_deliveries: 1024,
            chunk_bytes: 256 * 1024,
            verify_blocks: 64,
            verify_pause: 6000,
        }
    }
}

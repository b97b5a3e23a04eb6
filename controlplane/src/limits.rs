//! The limits every backend enforces, so that a program that works on one works on all.

/// Longest key, in bytes. etcd has no such limit; Kubernetes' longest keys are under 1 KiB.
pub const MAX_KEY_BYTES: usize = 4096;

/// Largest request, in bytes: keys, values and [`OP_OVERHEAD_BYTES`] for every operation, compare
/// and range bound in it. etcd refuses requests whose encoding exceeds 1.5 MiB
/// (`--max-request-bytes`); 4 KiB are kept for the envelope, so what passes here passes there.
pub const MAX_REQUEST_BYTES: usize = 1536 * 1024 - 4096;

/// What one operation or compare counts for on top of its key and value: more than its protobuf
/// framing takes in etcd.
pub const OP_OVERHEAD_BYTES: usize = 64;

/// Most operations in one list of a transaction, nested ones included on their path, and most
/// compares in one transaction: etcd's `--max-txn-ops`.
pub const MAX_TXN_OPS: usize = 128;

/// Largest answer to a range request, in bytes of keys and values. A larger range is refused with
/// [`StateError::TooLarge`](crate::StateError::TooLarge): ask for it in pages.
pub const MAX_RANGE_BYTES: usize = 64 * 1024 * 1024;

/// Longest lease, in seconds: etcd's limit.
pub const MAX_LEASE_TTL_SECONDS: i64 = 9_000_000_000;

/// Most leases of an embedded store at one time.
pub const MAX_LEASES: usize = 100_000;

/// Most watches of an embedded store at one time.
pub const MAX_WATCHES: usize = 10_000;

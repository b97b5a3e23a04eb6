//! Prometheus' text format.

use std::fmt::Write;

use crate::catalog::DiskStatus;
use crate::metrics::{OPERATIONS, QueueCounters};
use crate::overlay::chain::SourceCounters;

type Counter = (&'static str, &'static str, fn(&QueueCounters) -> u64);

const COUNTERS: [Counter; 11] = [
    ("reads_total", "Read requests completed.", |queue| {
        queue.reads
    }),
    ("writes_total", "Write requests completed.", |queue| {
        queue.writes
    }),
    ("flushes_total", "Flush requests completed.", |queue| {
        queue.flushes
    }),
    ("discards_total", "Discard requests completed.", |queue| {
        queue.discards
    }),
    (
        "write_zeroes_total",
        "Write zeroes requests completed.",
        |queue| queue.write_zeroes,
    ),
    (
        "other_requests_total",
        "Requests of other types completed.",
        |queue| queue.other,
    ),
    ("read_bytes_total", "Bytes read by the guest.", |queue| {
        queue.bytes_read
    }),
    (
        "written_bytes_total",
        "Bytes written by the guest.",
        |queue| queue.bytes_written,
    ),
    (
        "errors_total",
        "Requests answered with an error.",
        |queue| queue.errors,
    ),
    (
        "bounced_total",
        "Transfers through a bounce buffer.",
        |queue| queue.bounced,
    ),
    (
        "notifications_total",
        "Interrupts sent to the guest.",
        |queue| queue.notifications,
    ),
];

/// All metrics of these disks.
pub fn text(disks: &[DiskStatus]) -> String {
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = write_all(&mut out, disks);
    out
}

fn write_all(out: &mut String, disks: &[DiskStatus]) -> std::fmt::Result {
    writeln!(
        out,
        "# HELP keelson_blk_size_bytes The disk's size as the guest sees it."
    )?;
    writeln!(out, "# TYPE keelson_blk_size_bytes gauge")?;
    for disk in disks {
        let (id, bytes) = (escape(&disk.spec.id), disk.capacity_bytes);
        writeln!(out, "keelson_blk_size_bytes{{disk=\"{id}\"}} {bytes}")?;
    }
    for (name, help, value) in COUNTERS {
        writeln!(out, "# HELP keelson_blk_{name} {help}")?;
        writeln!(out, "# TYPE keelson_blk_{name} counter")?;
        for disk in disks {
            let id = escape(&disk.spec.id);
            for (queue, counters) in disk.counters.iter().enumerate() {
                let value = value(counters);
                writeln!(
                    out,
                    "keelson_blk_{name}{{disk=\"{id}\",queue=\"{queue}\"}} {value}"
                )?;
            }
        }
    }
    write_latencies(out, disks)?;
    write_sources(out, disks)
}

fn write_latencies(out: &mut String, disks: &[DiskStatus]) -> std::fmt::Result {
    let name = "keelson_blk_request_duration_seconds";
    writeln!(
        out,
        "# HELP {name} Time from taking a request out of its virtqueue to answering it."
    )?;
    writeln!(out, "# TYPE {name} histogram")?;
    for disk in disks {
        let id = escape(&disk.spec.id);
        for (operation, latencies) in OPERATIONS.iter().zip(&disk.latencies) {
            let labels = format!("disk=\"{id}\",operation=\"{operation}\"");
            for (limit, count) in latencies.cumulated() {
                writeln!(out, "{name}_bucket{{{labels},le=\"{limit}\"}} {count}")?;
            }
            let (count, seconds) = (latencies.count(), latencies.seconds());
            writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}")?;
            writeln!(out, "{name}_sum{{{labels}}} {seconds}")?;
            writeln!(out, "{name}_count{{{labels}}} {count}")?;
        }
    }
    Ok(())
}

type SourceCounter = (&'static str, &'static str, fn(&SourceCounters) -> u64);

const SOURCE_COUNTERS: [SourceCounter; 3] = [
    (
        "fetched_bytes_total",
        "Bytes fetched from the base's server, verified and kept.",
        |source| source.fetched_bytes,
    ),
    (
        "fetch_failures_total",
        "Attempts to fetch from the base's server that failed.",
        |source| source.failed_attempts,
    ),
    (
        "fetch_corrupt_chunks_total",
        "Chunks that came from the base's server with a wrong checksum.",
        |source| source.corrupt_chunks,
    ),
];

fn write_sources(out: &mut String, disks: &[DiskStatus]) -> std::fmt::Result {
    if disks.iter().all(|disk| disk.source.is_none()) {
        return Ok(());
    }
    for (name, help, value) in SOURCE_COUNTERS {
        writeln!(out, "# HELP keelson_blk_{name} {help}")?;
        writeln!(out, "# TYPE keelson_blk_{name} counter")?;
        for disk in disks {
            if let Some(source) = &disk.source {
                let (id, value) = (escape(&disk.spec.id), value(source));
                writeln!(out, "keelson_blk_{name}{{disk=\"{id}\"}} {value}")?;
            }
        }
    }
    Ok(())
}

fn escape(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

//! What guests use per second, from what they have used at two times.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use keelson_api::VirtualMachine;
use keelson_api::proto::{GuestUsage, UsageResponse};

use super::Sort;

/// A guest on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub phase: String,
    /// Its virtual processors.
    pub cpus: u8,
    /// Thousandths of a processor that it uses.
    pub cpu_permille: u64,
    /// Bytes of memory that it has, and that it may have.
    pub memory: u64,
    /// What it may have.
    pub memory_limit: u64,
    /// Bytes per second.
    pub read: u64,
    /// Bytes per second.
    pub written: u64,
    /// Bytes per second.
    pub received: u64,
    /// Bytes per second.
    pub sent: u64,
}

/// Works out rates from one look to the next.
#[derive(Debug, Default)]
pub struct Rates {
    at: u64,
    before: BTreeMap<String, GuestUsage>,
}

impl Rates {
    /// The guests that have something on this host. Without an earlier look, rates are zero.
    pub fn rows(&mut self, guests: &[VirtualMachine], usage: &UsageResponse) -> Vec<Row> {
        let passed = usage.nanoseconds.saturating_sub(self.at);
        let mut rows = Vec::new();
        for used in &usage.guests {
            let guest = guests.iter().find(|guest| guest.metadata.name == used.name);
            let before = self.before.get(&used.name);
            let rate = |value: fn(&GuestUsage) -> u64, scale: u64| {
                before.map_or(0, |before| {
                    // A guest that was started anew counts from zero.
                    let grown = value(used).saturating_sub(value(before));
                    let scaled = u128::from(grown) * u128::from(scale);
                    let rate = scaled.checked_div(u128::from(passed)).unwrap_or(0);
                    u64::try_from(rate).unwrap_or(u64::MAX)
                })
            };
            rows.push(Row {
                name: used.name.clone(),
                phase: guest.map_or("-".into(), |guest| guest.status.phase.to_string()),
                cpus: guest.map_or(0, |guest| guest.spec.cpus),
                memory_limit: guest.map_or(0, |guest| guest.spec.memory.bytes()),
                memory: used.memory_bytes,
                cpu_permille: rate(|used| used.cpu_nanoseconds, 1000),
                read: rate(|used| used.read_bytes, 1_000_000_000),
                written: rate(|used| used.written_bytes, 1_000_000_000),
                received: rate(|used| used.received_bytes, 1_000_000_000),
                sent: rate(|used| used.sent_bytes, 1_000_000_000),
            });
        }
        self.at = usage.nanoseconds;
        let guests = usage.guests.iter();
        self.before = guests
            .map(|used| (used.name.clone(), used.clone()))
            .collect();
        rows
    }
}

/// Sorts rows, the largest first; by name, the first first.
pub fn sort(rows: &mut [Row], sort: Sort) {
    rows.sort_by_key(|row| {
        let key = match sort {
            Sort::Cpu => row.cpu_permille,
            Sort::Memory => row.memory,
            Sort::Disk => row.read.saturating_add(row.written),
            Sort::Network => row.received.saturating_add(row.sent),
            Sort::Name => 0,
        };
        (Reverse(key), row.name.clone())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(seconds: u64, cpu_seconds: u64, read: u64) -> UsageResponse {
        UsageResponse {
            nanoseconds: seconds * 1_000_000_000,
            guests: vec![GuestUsage {
                name: "web".into(),
                cpu_nanoseconds: cpu_seconds * 1_000_000_000,
                read_bytes: read,
                ..GuestUsage::default()
            }],
        }
    }

    #[test]
    fn rates_are_what_grew_by_the_time() {
        let mut rates = Rates::default();
        assert_eq!(rates.rows(&[], &usage(100, 50, 0))[0].cpu_permille, 0);
        let rows = rates.rows(&[], &usage(104, 52, 8192));
        assert_eq!((rows[0].cpu_permille, rows[0].read), (500, 2048));
        // It was started anew.
        assert_eq!(rates.rows(&[], &usage(105, 0, 0))[0].cpu_permille, 0);
        // Twice at one time.
        assert_eq!(rates.rows(&[], &usage(105, 9, 0))[0].cpu_permille, 0);
    }
}

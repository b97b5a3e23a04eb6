//! Lookup tables of services: Maglev's consistent hashing (Eisenbud and others, NSDI 2016, 3.4).
//!
//! Each backend prefers the places of the table in an order of its own, and the backends take turns
//! in choosing: all get the same share, and when one comes or goes, few places change between the
//! others. The paper's table has a prime size, so that every step visits all places; here it is a power
//! of two, which a program finds by a mask, and steps are odd.

use keelson_ebpf_common::{NO_BACKEND, TABLE_PLACES};

/// A table that shares its places among backends, each given as what the table holds for it and what it
/// is told from others by; the same for the same backends, whatever their order.
pub fn table(backends: &[(u8, u64)]) -> [u8; TABLE_PLACES] {
    let mut table = [NO_BACKEND; TABLE_PLACES];
    let mut preferences: Vec<Preference> = backends.iter().map(Preference::of).collect();
    preferences.sort_by_key(|preference| preference.identity);
    let mut free = TABLE_PLACES;
    while free > 0 && !preferences.is_empty() {
        for preference in &mut preferences {
            if free == 0 {
                break;
            }
            let place = preference.next_free(&table);
            table[place] = preference.backend;
            free -= 1;
        }
    }
    table
}

/// A backend's order of places.
struct Preference {
    backend: u8,
    identity: u64,
    next: usize,
    step: usize,
}

impl Preference {
    fn of(&(backend, identity): &(u8, u64)) -> Self {
        let low = |number: u64| usize::try_from(number % TABLE_PLACES as u64).unwrap_or(0);
        Self {
            backend,
            identity,
            next: low(mix(identity)),
            step: low(mix(!identity)) | 1,
        }
    }

    /// The first place in its order that nobody has taken; there must be one.
    fn next_free(&mut self, table: &[u8; TABLE_PLACES]) -> usize {
        loop {
            let place = self.next;
            self.next = (self.next + self.step) % TABLE_PLACES;
            if table[place] == NO_BACKEND {
                return place;
            }
        }
    }
}

/// Numbers that are as good as random, different ones for different numbers (SplitMix64).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// What a backend is told from others by.
pub fn identity(address: keelson_ebpf_common::Address, port: u16) -> u64 {
    address
        .into_iter()
        .chain([u32::from(port)])
        .fold(0, |sum, word| mix(sum ^ u64::from(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u8) -> Vec<(u8, u64)> {
        (0..count)
            .map(|number| (number, identity([0, 0, 0xffff, u32::from(number)], 80)))
            .collect()
    }

    #[test]
    fn without_backends_every_place_is_empty() {
        assert!(table(&[]).iter().all(|place| *place == NO_BACKEND));
    }

    #[test]
    fn shares_are_even() {
        for count in [1, 2, 3, 7, 100, 128] {
            let table = table(&backends(count));
            for backend in 0..count {
                let mut places = Vec::from(table);
                places.retain(|place| *place == backend);
                let share = places.len();
                let even = TABLE_PLACES / usize::from(count);
                assert!((even..=even + 1).contains(&share), "{count}: {share}");
            }
        }
    }

    #[test]
    fn the_order_of_backends_does_not_matter() {
        let mut reversed = backends(9);
        reversed.reverse();
        assert_eq!(table(&backends(9)), table(&reversed));
    }

    /// One in ten leaves: its places change hands, and few others (under 3% in the paper's figure 12).
    #[test]
    fn few_places_change_hands() {
        let before = table(&backends(10));
        let mut left = backends(10);
        left.remove(4);
        let after = table(&left);
        let moved = before.iter().zip(&after);
        let moved = moved.filter(|(before, after)| **before != 4 && before != after);
        let moved = moved.count();
        assert!(moved < TABLE_PLACES / 20, "{moved} of {TABLE_PLACES}");
    }
}

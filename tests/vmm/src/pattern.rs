//! The payload's disk pattern, computed a second time from its description in
//! `tests/payload/src/steps/block.rs`.

/// Sector `sector` (512 bytes) of the pattern under `seed`.
pub fn pattern_sector(sector: u64, seed: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (word, chunk) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
        let value = match word {
            0 => sector,
            1 => seed,
            _ => split_mix(
                seed.wrapping_add(sector.wrapping_mul(64))
                    .wrapping_add(word),
            ),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// splitmix64's output for the state `value`.
fn split_mix(value: u64) -> u64 {
    let state = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_mix_gives_the_published_sequence() {
        // The first outputs of the reference implementation from state 0.
        assert_eq!(split_mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(split_mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }
}

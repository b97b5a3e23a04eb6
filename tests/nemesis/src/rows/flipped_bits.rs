use std::path::Path;

use super::Notes;
use super::damage::{Bench, Damage, How};
use crate::cluster::Setup;

/// Each file of a follower gets one flipped bit: in a value, where it holds one, and in two other
/// places that are in use; while it is down, and in values while it runs as well.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(setup.seed);
    let mut bench = Bench::new(folder, setup).await?;
    for (file, content) in bench.files()? {
        let mut damages = Vec::new();
        if let Some(at) = in_a_value(&content, &mut random) {
            for live in [false, true] {
                damages.push((live, at, "one bit of a value"));
            }
        }
        for _ in 0..2 {
            if let Some(at) = in_use(&content, &mut random) {
                damages.push((false, at, "one bit in use"));
            }
        }
        for (live, at, what) in damages {
            let damage = Damage {
                file: file.clone(),
                live,
                what: format!("{what}, at byte {at},"),
                how: How::Flip(at, random.u8(..8)),
            };
            bench.damage(&damage, notes).await?;
        }
    }
    notes.note_fates()
}

/// A byte of some value.
fn in_a_value(content: &[u8], random: &mut fastrand::Rng) -> Option<u64> {
    const BEGIN: &[u8] = b"value of data/";
    let from = random.usize(..content.len());
    let found = |from: usize| {
        let rest = content.get(from..)?;
        let at = rest
            .windows(BEGIN.len())
            .position(|window| window == BEGIN)?;
        u64::try_from(from + at + 3).ok()
    };
    found(from).or_else(|| found(0))
}

/// A byte that is not zero.
fn in_use(content: &[u8], random: &mut fastrand::Rng) -> Option<u64> {
    let from = random.usize(..content.len());
    let found = |from: usize| {
        let at = content.get(from..)?.iter().position(|byte| *byte != 0)?;
        u64::try_from(from + at).ok()
    };
    found(from).or_else(|| found(0))
}

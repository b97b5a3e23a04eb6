use std::path::Path;

use super::Notes;
use super::damage::{Bench, Damage, How, is_log};
use crate::cluster::Setup;

/// The log of a member that is down ends with half of a write that nobody was told of, as after a loss
/// of power; or something is missing of what was acknowledged, at its end or in its middle, which no
/// such loss does.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let program = setup.program;
    let mut bench = Bench::new(folder, setup).await?;
    let mut logs = bench.files()?;
    logs.retain(|(file, _)| is_log(program, file));
    // The one in which the last entries are; the names of both are in order of age.
    let Some((file, content)) = logs.pop() else {
        anyhow::bail!("the member has no log");
    };
    let (at, half) = bench.half_of_a_write(&file, &content).await?;
    let used = content.iter().rposition(|byte| *byte != 0).unwrap_or(0) as u64 + 1;
    let cases = [
        ("half of a write at the end", How::Write(at, half)),
        (
            "the last 100 bytes are cut off",
            How::Cut(used.saturating_sub(100)),
        ),
        (
            "the last 100 bytes are zero",
            How::Zero(used.saturating_sub(100), 100),
        ),
        ("100 bytes in the middle are zero", How::Zero(used / 2, 100)),
        (
            "4 KiB in the middle are zero",
            How::Zero(used / 2 / 4096 * 4096, 4096),
        ),
        ("the last half is cut off", How::Cut(used / 2)),
    ];
    for (what, how) in cases {
        let damage = Damage {
            file: file.clone(),
            live: false,
            what: format!("({what})"),
            how,
        };
        bench.damage(&damage, notes).await?;
    }
    notes.note_fates()
}

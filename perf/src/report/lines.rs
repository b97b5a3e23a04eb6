//! Samples as lines of JSON: how a run in the lab tells them.

use anyhow::Context as _;
use keelson_lab::{Exec, Lab};

use super::Sample;

/// Prints samples, one on each line.
pub fn print(samples: &[Sample]) -> anyhow::Result<()> {
    for sample in samples {
        println!("{}", serde_json::to_string(sample)?);
    }
    Ok(())
}

/// Runs a command in a lab, which ends then; what it [`print`]ed of these peers and figures.
pub fn run_in(
    lab: Lab,
    command: &Exec,
    peers: &[&'static str],
    figures: &[&'static str],
) -> anyhow::Result<Vec<Sample>> {
    let output = lab.output(command, b"")?;
    anyhow::ensure!(
        output.status.success(),
        "in the lab: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    lab.shut_down()?;
    parse(&output.text(), peers, figures)
}

/// What [`print`] printed of these peers and figures.
fn parse(
    text: &str,
    peers: &[&'static str],
    figures: &[&'static str],
) -> anyhow::Result<Vec<Sample>> {
    let sample = |line: &str| -> anyhow::Result<Sample> {
        let value: serde_json::Value = serde_json::from_str(line)?;
        let name = value["peer"].as_str().unwrap_or_default();
        let peer = peers.iter().copied().find(|peer| *peer == name);
        Ok(Sample {
            peer: peer.with_context(|| format!("a peer of this name: {name:?}"))?,
            work: value["work"].as_str().context("work")?.to_owned(),
            round: u32::try_from(value["round"].as_u64().context("round")?)?,
            figures: figures
                .iter()
                .copied()
                .filter_map(|name| Some((name, value["figures"][name].as_f64()?)))
                .collect(),
        })
    };
    text.lines()
        .filter(|line| line.starts_with('{'))
        .map(sample)
        .collect()
}

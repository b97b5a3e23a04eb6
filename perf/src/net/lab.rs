//! The same comparison in the lab: on a stock Debian kernel, which has Open vSwitch's module, but emulated, so
//! that only ratios mean something.

use std::path::Path;
use std::time::Duration;

use keelson_lab::{Exec, FileCopy, Lab, LabOptions};

use super::openvswitch;
use crate::report::{Sample, lines};

use super::{FIGURES, Peer};

/// Rounds in the lab.
pub const ROUNDS: u32 = 2;
/// How long each measurement takes there.
pub const DURATION: Duration = Duration::from_millis(500);
/// What names of work there end with.
pub const SUFFIX: &str = ", in the lab";

/// Beside what every lab has: what the peers are made of.
const MODULES: [&str; 5] = ["veth", "bridge", "br_netfilter", "nf_tables", "nft_ct"];

/// Runs this program in the lab.
pub fn measure(only: Option<&str>) -> anyhow::Result<Vec<Sample>> {
    let own = std::env::current_exe()?;
    let copy = |from: &Path, to: &Path| FileCopy {
        from: from.into(),
        to: to.into(),
    };
    let mut options = LabOptions {
        files: vec![copy(&own, Path::new("/usr/bin/perf"))],
        tools: vec!["nft".to_owned()],
        modules: MODULES.map(str::to_owned).into(),
        ..LabOptions::default()
    };
    if openvswitch::is_installed() {
        let schema = Path::new(openvswitch::SCHEMA);
        options.modules.push(openvswitch::MODULE.to_owned());
        options
            .tools
            .extend(openvswitch::PROGRAMS.map(str::to_owned));
        options.files.push(copy(schema, schema));
    }
    let lab = Lab::boot(&options)?;
    let mut arguments = vec!["perf", "net", "--only-samples"];
    if let Some(only) = only {
        arguments.extend(["--only", only]);
    }
    let rounds = ROUNDS.to_string();
    let seconds = DURATION.as_secs_f64().to_string();
    arguments.extend(["--rounds", &rounds, "--seconds", &seconds]);
    let exec = Exec {
        arguments: arguments.into_iter().map(str::to_owned).collect(),
        timeout_seconds: Some(420),
        ..Exec::default()
    };
    let mut samples = lines::run_in(lab, &exec, &Peer::ALL.map(Peer::name), &FIGURES)?;
    for sample in &mut samples {
        sample.work.push_str(SUFFIX);
    }
    Ok(samples)
}

//! Three agents on one state store: how long a guest is gone when its host dies.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_vmm_tests::payload;

use super::client::{guest, runs};
use super::host::Host;
use super::{AGENT, Add};

/// What is measured.
pub const WORK: &str = "a host dies";
const LIMIT: Duration = Duration::from_mins(2);
const NAMES: [&str; 3] = ["a", "b", "c"];

/// One round, on the state store at `state`.
pub async fn measure(
    keelsond: &Path,
    root: &Path,
    state: &str,
    lease_seconds: u32,
    round: u32,
    add: &mut Add<'_>,
) -> anyhow::Result<()> {
    let mut hosts = Vec::new();
    for name in NAMES {
        let more = format!("host_name = \"{name}\"\nhost_lease_seconds = {lease_seconds}\n");
        hosts.push(Host::start(keelsond, root, Some(state), &more)?);
    }
    for host in &hosts {
        host.client().ready().await?;
    }
    let names: Vec<String> = (0..6).map(|at| format!("moves-{round}-{at}")).collect();
    let guests: Vec<_> = names
        .iter()
        .map(|name| {
            let mut guest = guest(name, "32Mi", payload(), "hang");
            guest["spec"]["failover"] = "Restart".into();
            guest
        })
        .collect();
    hosts[0].client().apply(&guests).await?;
    hosts[0].client().wait_for(&names, LIMIT, runs).await?;
    let place = |guest: &serde_json::Value| guest["status"]["placement"]["host"].clone();
    let placed = hosts[0].client().objects("VirtualMachine").await?;
    let dead = place(placed.first().context("guests are there")?);
    let dead = NAMES
        .iter()
        .position(|name| dead == *name)
        .context("a guest is placed on one of the hosts")?;
    let moved: Vec<String> = placed
        .iter()
        .filter(|guest| place(guest) == NAMES[dead])
        .filter_map(|guest| guest["metadata"]["name"].as_str().map(str::to_owned))
        .collect();
    hosts[dead].crash();
    let died = Instant::now();
    let mut asked = hosts[usize::from(dead == 0)].client();
    let elsewhere = |guest: Option<&serde_json::Value>| {
        runs(guest) && guest.is_some_and(|guest| place(guest) != NAMES[dead])
    };
    asked.wait_for(&moved, LIMIT, elsewhere).await?;
    let seconds = died.elapsed().as_secs_f64();
    let figures = [
        ("lease_s", f64::from(lease_seconds)),
        ("elsewhere_s", seconds),
        ("beyond_lease_s", seconds - f64::from(lease_seconds)),
    ];
    add(AGENT, WORK, round, &BTreeMap::from(figures));
    Ok(())
}

use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tokio::time::{sleep, timeout};

use super::Notes;
use super::data::Data;
use super::prober::{Probe, Probed, Prober};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// How long disks are full.
const FULL: Duration = Duration::from_secs(12);

/// The leader's disk is full for some time, then the disks of all; writers go on, and fill what is
/// left. Members that end are started again, as systemd would.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let data = Data {
        keys: 2000,
        bytes: 4096,
    };
    data.load(&urls[0]).await?;
    let leader = admin::wait_for_leader(&urls, Duration::from_secs(10)).await?;
    fill(&mut cluster, &[leader], "leader's disk full", notes).await?;
    fill(&mut cluster, &[0, 1, 2], "all disks full", notes).await?;
    let found = data.look(&urls[0]).await?;
    notes.note("lost or wrong afterwards", found.missing + found.wrong);
    Ok(())
}

async fn fill(
    cluster: &mut Cluster,
    whose: &[usize],
    case: &str,
    notes: &mut Notes,
) -> anyhow::Result<()> {
    let urls = cluster.client_urls();
    let (puts, ranges) = (
        Prober::start(&urls, Probe::Put),
        Prober::start(&urls, Probe::Range),
    );
    // What was preallocated is used up, so that the disk is really in the way.
    let filler = tokio::spawn(fill_up(urls.clone()));
    sleep(Duration::from_secs(1)).await;
    let begin = Instant::now();
    let mut ended = 0;
    while begin.elapsed() < FULL {
        for at in whose {
            cluster.disk(*at).fill()?;
        }
        ended += cluster.supervise()?.len();
        sleep(Duration::from_millis(500)).await;
    }
    filler.abort();
    let room = Instant::now();
    for at in whose {
        cluster.disk(*at).make_room()?;
    }
    while room.elapsed() < Duration::from_secs(20) {
        ended += cluster.supervise()?.len();
        sleep(Duration::from_millis(200)).await;
    }
    let (puts, ranges) = (puts.stop().await, ranges.stop().await);
    let mut note =
        |what: &str, value: serde_json::Value| notes.note(&format!("{case}: {what}"), value);
    note("writes done meanwhile", puts.count(begin, room).into());
    note("reads done meanwhile", ranges.count(begin, room).into());
    note(
        "longest time without a read, s",
        ranges.longest_gap(begin, room).as_secs_f64().into(),
    );
    note("members that ended", ended.into());
    note("writes again after, s", after(&puts, room));
    note("errors of writes", serde_json::to_value(&puts.errors)?);
    Ok(())
}

/// The time from there being room again to the first write.
fn after(puts: &Probed, room: Instant) -> serde_json::Value {
    let first = puts.answered.iter().find(|(call, _)| *call >= room);
    first.map_or("never, in 20 s".into(), |(_, end)| {
        (*end - room).as_secs_f64().into()
    })
}

/// Writes under keys of its own until it is ended.
async fn fill_up(urls: Vec<String>) {
    for number in 0_usize.. {
        let put = pb::PutRequest {
            key: format!("fill/{}", number % 200).into(),
            value: vec![b'f'; 200_000].into(),
            ..pb::PutRequest::default()
        };
        let written = async {
            let channel = admin::connect(&urls[number % urls.len()]).await?;
            anyhow::Ok(KvClient::new(channel).put(put).await?)
        };
        // It fails where the disk is full: what else.
        if !matches!(timeout(Duration::from_secs(2), written).await, Ok(Ok(_))) {
            sleep(Duration::from_millis(50)).await;
        }
    }
}

//! Questions and commands to members, each with a time limit.

use std::time::Duration;

use anyhow::{Context as _, bail};
use keelson_etcd_api::etcdserverpb as pb;
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tonic::transport::{Channel, Endpoint};

/// How long a member may take to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// A connection to a member.
pub async fn connect(url: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(LIMIT);
    Ok(endpoint.connect().await?)
}

/// As [`connect`], with a time limit for each request.
async fn connect_limited(url: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?;
    Ok(endpoint
        .connect_timeout(LIMIT)
        .timeout(LIMIT)
        .connect()
        .await?)
}

/// Whether a member answers a read that needs a leader.
pub async fn answers(url: &str) -> bool {
    let Ok(channel) = connect_limited(url).await else {
        return false;
    };
    let request = pb::RangeRequest {
        key: "ready".into(),
        ..pb::RangeRequest::default()
    };
    KvClient::new(channel).range(request).await.is_ok()
}

/// Whether a member does a write.
pub async fn writes(url: &str) -> bool {
    let Ok(channel) = connect_limited(url).await else {
        return false;
    };
    let request = pb::PutRequest {
        key: "ready".into(),
        ..pb::PutRequest::default()
    };
    KvClient::new(channel).put(request).await.is_ok()
}

/// What a member says of itself.
pub async fn status(url: &str) -> anyhow::Result<pb::StatusResponse> {
    let channel = connect_limited(url).await?;
    let answer = MaintenanceClient::new(channel)
        .status(pb::StatusRequest {})
        .await?;
    Ok(answer.into_inner())
}

/// The member that leads: the one that says so of itself in the highest term.
pub async fn leader(urls: &[String]) -> Option<usize> {
    let statuses = futures::future::join_all(urls.iter().map(|url| status(url))).await;
    let leaders = statuses.into_iter().enumerate().filter_map(|(at, status)| {
        let status = status.ok()?;
        let id = status.header?.member_id;
        (status.leader == id && id != 0).then_some((status.raft_term, at))
    });
    leaders.max().map(|(_, at)| at)
}

/// Waits for a leader.
pub async fn wait_for_leader(urls: &[String], limit: Duration) -> anyhow::Result<usize> {
    let waiting = async {
        loop {
            if let Some(leader) = leader(urls).await {
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(limit, waiting)
        .await
        .context("there is no leader")
}

/// A hash of what a member holds, and of which revision.
pub async fn hash(url: &str, revision: i64) -> anyhow::Result<(u32, i64, i64)> {
    let channel = connect_limited(url).await?;
    let answer = MaintenanceClient::new(channel)
        .hash_kv(pb::HashKvRequest { revision })
        .await?;
    let answer = answer.into_inner();
    Ok((answer.hash, answer.compact_revision, answer.hash_revision))
}

/// The members that the cluster has.
pub async fn members(urls: &[String]) -> anyhow::Result<Vec<pb::Member>> {
    first_to(urls, async |channel| {
        let request = pb::MemberListRequest { linearizable: true };
        Ok(ClusterClient::new(channel)
            .member_list(request)
            .await?
            .into_inner()
            .members)
    })
    .await
}

/// Removes a member.
pub async fn remove(urls: &[String], id: u64) -> anyhow::Result<()> {
    first_to(urls, async |channel| {
        let request = pb::MemberRemoveRequest { id };
        ClusterClient::new(channel).member_remove(request).await?;
        Ok(())
    })
    .await
}

/// Adds a learner: its ID.
pub async fn add_learner(urls: &[String], peer_url: &str) -> anyhow::Result<u64> {
    first_to(urls, async |channel| {
        let request = pb::MemberAddRequest {
            peer_ur_ls: vec![peer_url.to_owned()],
            is_learner: true,
        };
        let answer = ClusterClient::new(channel)
            .member_add(request)
            .await?
            .into_inner();
        Ok(answer.member.context("no member in the answer")?.id)
    })
    .await
}

/// Makes a learner a voter; done already is as well.
pub async fn promote(urls: &[String], id: u64) -> anyhow::Result<()> {
    let member = members(urls)
        .await?
        .into_iter()
        .find(|member| member.id == id);
    if !member.context("the learner is gone")?.is_learner {
        return Ok(());
    }
    first_to(urls, async |channel| {
        let request = pb::MemberPromoteRequest { id };
        ClusterClient::new(channel).member_promote(request).await?;
        Ok(())
    })
    .await
}

async fn first_to<T>(
    urls: &[String],
    ask: impl AsyncFn(Channel) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut last = None;
    for url in urls {
        let answer = match connect_limited(url).await {
            Ok(channel) => ask(channel).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => return Ok(answer),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error),
        None => bail!("there is nobody to ask"),
    }
}

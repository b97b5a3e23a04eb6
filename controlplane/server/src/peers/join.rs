//! How a member that joins a cluster learns who it is.

use std::time::Duration;

use anyhow::Context as _;
use keelson_member::RequestError;
use keelson_member::keyspace::Member as MemberInfo;
use tonic::Code;

use super::{Connector, proto};

use crate::options::MemberFlags;

/// How often members are asked for a leader, and how long it is waited in between.
const ATTEMPTS: u32 = 10;
const RETRY: Duration = Duration::from_millis(500);

/// What the cluster knows of itself, and of this member.
#[derive(Debug)]
pub struct Joined {
    /// The cluster's id.
    pub cluster_id: u64,
    /// The id that the cluster gave to this member.
    pub member_id: u64,
    /// All members.
    pub members: Vec<MemberInfo>,
    /// Whether this member has been in the cluster before, and lost what it had.
    pub has_been_there: bool,
}

/// Asks the members that `--initial-cluster` names, one after the other.
pub async fn ask(flags: &MemberFlags, connector: &Connector) -> anyhow::Result<Joined> {
    let listed = flags.members()?;
    let mut failures = Vec::new();
    for (name, urls) in &listed {
        if *name == flags.name {
            continue;
        }
        for url in urls {
            match membership(connector, url).await {
                Ok(response) => return find_self(flags, response),
                Err(error) => failures.push(format!("{url}: {error:#}")),
            }
        }
    }
    anyhow::ensure!(
        !failures.is_empty(),
        "--initial-cluster names no other member to ask: give all members of the cluster"
    );
    anyhow::bail!(
        "no member of the cluster answers ({}): see that they run and that this host reaches their peer \
         URLs, and start this member again (under a supervisor, it goes on by itself when they answer)",
        failures.join("; ")
    )
}

/// Has the cluster put this member in the place of `gone`. A member that does not lead refuses, and
/// the next one is asked.
pub async fn replace(
    flags: &MemberFlags,
    gone: &str,
    connector: &Connector,
) -> anyhow::Result<Joined> {
    let mut failures = Vec::new();
    for _ in 0..ATTEMPTS {
        failures.clear();
        for (name, urls) in flags.members()? {
            if name == flags.name {
                continue;
            }
            for url in urls {
                let request = proto::ReplaceRequest {
                    member: gone.to_owned(),
                    peer_urls: flags.initial_advertise_peer_urls.clone(),
                };
                let mut client = connector.client(&url)?;
                match client.replace(request).await {
                    Ok(response) => return find_self(flags, response.into_inner()),
                    Err(error) if error.message() == RequestError::NotLeader.to_string() => {}
                    // The leader has decided.
                    Err(error)
                        if matches!(error.code(), Code::NotFound | Code::FailedPrecondition) =>
                    {
                        anyhow::bail!("cannot replace {gone:?}: {}", error.message());
                    }
                    Err(error) => failures.push(format!("{url}: {}", error.message())),
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
    anyhow::bail!(
        "no leader among the members of --initial-cluster answers: {}",
        failures.join("; ")
    )
}

async fn membership(connector: &Connector, url: &str) -> anyhow::Result<proto::MembershipResponse> {
    let mut client = connector.client(url)?;
    let response = client.membership(proto::MembershipRequest {}).await?;
    Ok(response.into_inner())
}

fn find_self(flags: &MemberFlags, response: proto::MembershipResponse) -> anyhow::Result<Joined> {
    let members: Vec<MemberInfo> = response.members.into_iter().map(MemberInfo::from).collect();
    let mut advertised = flags.initial_advertise_peer_urls.clone();
    advertised.sort_unstable();
    let own = members
        .iter()
        .find(|member| {
            let mut urls = member.peer_urls.clone();
            urls.sort_unstable();
            urls == advertised
        })
        .with_context(|| {
            format!(
                "the cluster has no member at {}: add it first (etcdctl member add {} --peer-urls={})",
                advertised.join(","),
                flags.name,
                advertised.join(",")
            )
        })?;
    Ok(Joined {
        cluster_id: response.cluster_id,
        member_id: own.id,
        has_been_there: !own.name.is_empty(),
        members,
    })
}

impl From<proto::Member> for MemberInfo {
    fn from(member: proto::Member) -> Self {
        Self {
            id: member.id,
            name: member.name,
            peer_urls: member.peer_urls,
            client_urls: member.client_urls,
            is_learner: member.is_learner,
            rebuild: 0,
        }
    }
}

impl From<MemberInfo> for proto::Member {
    fn from(member: MemberInfo) -> Self {
        Self {
            id: member.id,
            name: member.name,
            peer_urls: member.peer_urls,
            client_urls: member.client_urls,
            is_learner: member.is_learner,
        }
    }
}

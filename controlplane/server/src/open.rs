//! Opens the member: as it is, as a new one, or rebuilt from the others.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::rebuild::Opening;
use keelson_member::{Identity, Limits, Member, MemberOptions, Start, rebuild};

use crate::disk::{ServerDisk, Waiting};
use crate::metrics::{Metrics, Rebuilds};
use crate::node::Node;
use crate::options::{ClusterState, Options};
use crate::peers::rebuild::Damaged;
use crate::peers::{self, Connector, Lobby};
use crate::stall::SlowSyncs;

/// How often the other founders are asked.
const FOUNDERS_POLL: Duration = Duration::from_millis(200);

/// The member and its disk.
pub struct Opened {
    pub member: Member,
    pub disk: Arc<dyn Disk>,
    pub identity: Identity,
}

/// How a member begins that has no data.
enum Beginning {
    /// It never had any.
    New(Start),
    /// It had some.
    Lost,
}

/// Locks the data folder.
pub fn lock(
    options: &Options,
    metrics: &Metrics,
    waiting: &Waiting,
    slow_syncs: &SlowSyncs,
) -> anyhow::Result<Arc<dyn Disk>> {
    let folder = options.member.folder();
    let disk = Folder::open(&folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock => {
            anyhow::anyhow!("{} is in use by another process", folder.display())
        }
        _ => anyhow::anyhow!("cannot open {}: {error}", folder.display()),
    })?;
    Ok(Arc::new(ServerDisk::new(
        Arc::new(disk),
        metrics.log_syncs.clone(),
        metrics.engine_syncs.clone(),
        slow_syncs.clone(),
        waiting.clone(),
    )))
}

/// Opens the member. One that is damaged is rebuilt first, if there are others.
pub async fn open(
    options: &Options,
    disk: Arc<dyn Disk>,
    connector: &Connector,
    lobby: &Lobby,
    metrics: &Rebuilds,
) -> anyhow::Result<Opened> {
    let folder = options.member.folder();
    let here = || format!("in {}", folder.display());
    let stored = Identity::load(&*disk).with_context(here)?;
    let (identity, mut start) = match stored.filter(Identity::has_begun) {
        Some(identity) => (identity, Start::Continue),
        None => begin(options, &disk, connector, lobby).await?,
    };
    let urls = other_urls(options, &identity);
    let member = loop {
        let (seed, _) = uuid::Uuid::new_v4().as_u64_pair();
        let member_options = MemberOptions {
            cluster_id: identity.cluster_id,
            id: identity.member_id,
            start: start.clone(),
            election_ticks: options.election_ticks()? as usize,
            seed,
            cache_bytes: options.cache_mib * 1024 * 1024,
            limits: Limits::default(),
        };
        let opened = rebuild::open(&disk, &member_options, !urls.is_empty());
        let reason = match opened.with_context(here)? {
            Opening::Whole(member) => break *member,
            Opening::Damaged(reason) => reason,
        };
        lobby.answer(identity.cluster_id, || false);
        let damaged = Damaged {
            disk: &disk,
            identity: &identity,
            urls: &urls,
            connector,
            metrics,
        };
        damaged.rebuild(&reason).await.with_context(here)?;
        start = Start::Continue;
    };
    check_owner(options, &identity, &member.keyspace().metadata().members)?;
    if !matches!(start, Start::Continue) {
        identity.store(&*disk)?;
    }
    Ok(Opened {
        member,
        disk,
        identity,
    })
}

/// Refuses the folder of another member, one that has this one's name and URLs: it would be there
/// twice, and both would vote.
fn check_owner(
    options: &Options,
    identity: &Identity,
    members: &[MemberInfo],
) -> anyhow::Result<()> {
    let flags = &options.member;
    let is_started_as = |member: &MemberInfo| {
        let urls = &flags.initial_advertise_peer_urls;
        member.name == flags.name && member.peer_urls.iter().all(|url| urls.contains(url))
    };
    let own = |member: &&MemberInfo| member.id == identity.member_id;
    let other = members
        .iter()
        .find(|member| !own(member) && is_started_as(member));
    if let (Some(own), Some(other)) = (members.iter().find(own), other) {
        anyhow::bail!(
            "{} is the data of member {:?} ({:x}), and this is started as {:?} ({:x}): start each member \
             on its own folder, and never on a copy of another one's",
            flags.folder().display(),
            own.name,
            own.id,
            other.name,
            other.id
        );
    }
    Ok(())
}

/// Where the other members may be.
pub fn other_urls(options: &Options, identity: &Identity) -> Vec<String> {
    let mut urls = identity.peer_urls.clone();
    for (name, listed) in options.member.members().unwrap_or_default() {
        if name != options.member.name {
            urls.extend(listed);
        }
    }
    let own = &options.member.initial_advertise_peer_urls;
    urls.retain(|url| !own.contains(url));
    urls.sort_unstable();
    urls.dedup();
    urls
}

/// Keeps what the folder says of the other members' URLs in step with the membership.
pub async fn remember_peers(node: Node, disk: Arc<dyn Disk>, mut identity: Identity) {
    loop {
        let metadata = node.keyspace().metadata();
        let others = metadata
            .members
            .into_iter()
            .filter(|member| member.id != identity.member_id);
        let mut urls: Vec<String> = others.flat_map(|member| member.peer_urls).collect();
        urls.sort_unstable();
        if urls != identity.peer_urls {
            identity.peer_urls = urls;
            let (stored, disk) = (identity.clone(), Arc::clone(&disk));
            match tokio::task::spawn_blocking(move || stored.store(&*disk)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "cannot note where other members are"),
                Err(error) => tracing::warn!(%error, "cannot note where other members are"),
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Who a member without data is, and how it begins. That it begins is noted before it does: a start
/// that is broken off is not mistaken for data that is lost.
async fn begin(
    options: &Options,
    disk: &Arc<dyn Disk>,
    connector: &Connector,
    lobby: &Lobby,
) -> anyhow::Result<(Identity, Start)> {
    let folder = options.member.folder();
    let unfinished = Identity::load(&**disk)?.is_some();
    if unfinished {
        rebuild::clear(&**disk)?;
    }
    anyhow::ensure!(
        !rebuild::has_data(&**disk)?,
        "{} holds a member's data, and the files that say whose it is are missing: put them back, or \
         empty the folder and have the member rebuilt from the others",
        folder.display()
    );
    let (identity, beginning) = match (options.initial_cluster_state, &options.replace) {
        (ClusterState::New, None) => found(options, connector, lobby).await?,
        (_, gone) => {
            let joined = match gone {
                Some(gone) => peers::join::replace(&options.member, gone, connector).await?,
                None => peers::join::ask(&options.member, connector).await?,
            };
            let identity = Identity::new(joined.cluster_id, joined.member_id);
            let beginning = if joined.has_been_there {
                Beginning::Lost
            } else {
                Beginning::New(Start::Join(joined.members))
            };
            (identity, beginning)
        }
    };
    match beginning {
        Beginning::New(start) => {
            identity.beginning().store(&**disk)?;
            Ok((identity, start))
        }
        Beginning::Lost => {
            // The marker first: without it, the identity is that of a member with data.
            rebuild::begin(&**disk, "its data is lost, or the cluster began without it")?;
            identity.store(&**disk)?;
            Ok((identity, Start::Continue))
        }
    }
}

/// A founder with an empty folder: whether it founds the cluster, or had founded it before.
async fn found(
    options: &Options,
    connector: &Connector,
    lobby: &Lobby,
) -> anyhow::Result<(Identity, Beginning)> {
    let founders = options.member.founders()?;
    let identity = Identity::new(founders.cluster_id, founders.member_id);
    let others: Vec<Vec<String>> = founders
        .members
        .iter()
        .filter(|member| member.id != founders.member_id)
        .map(|member| member.peer_urls.clone())
        .collect();
    lobby.answer(founders.cluster_id, || true);
    let mut waited = 0_u32;
    let pristine = loop {
        let answer = peers::pristine_quorum(connector, founders.cluster_id, &others).await;
        if let Some(pristine) = answer {
            break pristine;
        }
        if waited.is_multiple_of(50) {
            tracing::info!("waits for other founders of the cluster: a quorum of them has to run");
        }
        waited += 1;
        tokio::time::sleep(FOUNDERS_POLL).await;
    };
    let beginning = if pristine {
        Beginning::New(Start::New(founders.members))
    } else {
        Beginning::Lost
    };
    Ok((identity, beginning))
}

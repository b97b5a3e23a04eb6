//! Ids of clusters and members, from what the operator wrote: the same flags give the same ids.

use sha2::{Digest, Sha256};

/// A member's id: from its peer URLs and the cluster's token.
pub fn member_id(peer_urls: &[String], token: &str) -> u64 {
    let mut urls = peer_urls.to_vec();
    urls.sort_unstable();
    let mut hasher = Sha256::new();
    for url in &urls {
        hasher.update(url.as_bytes());
        hasher.update([0]);
    }
    hasher.update(token.as_bytes());
    first_bytes(hasher)
}

/// A cluster's id: from the ids of its first members, and its token.
pub fn cluster_id(members: &[u64], token: &str) -> u64 {
    let mut ids = members.to_vec();
    ids.sort_unstable();
    let mut hasher = Sha256::new();
    for id in ids {
        hasher.update(id.to_be_bytes());
    }
    hasher.update(token.as_bytes());
    first_bytes(hasher)
}

/// An id for a member that is added to a cluster: never given before.
pub fn new_member_id() -> u64 {
    let (id, _) = uuid::Uuid::new_v4().as_u64_pair();
    id.max(1)
}

/// Whether `url` is one that a member can listen on: `http://HOST:PORT`, or with `https`.
pub fn is_url(url: &str) -> bool {
    address(url).is_some()
}

/// HOST:PORT of `http://HOST:PORT` or `https://HOST:PORT`.
pub fn address(url: &str) -> Option<&str> {
    let address = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))?;
    let address = address.strip_suffix('/').unwrap_or(address);
    let (host, port) = address.rsplit_once(':')?;
    (!host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()).then_some(address)
}

fn first_bytes(hasher: Sha256) -> u64 {
    let digest = hasher.finalize();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest[..8]);
    // 0 is no member.
    u64::from_be_bytes(bytes).max(1)
}

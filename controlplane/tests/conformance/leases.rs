use std::time::Duration;

use keelson_controlplane::{
    EventKind, LeaseGrantRequest, LeaseId, NO_LEASE, PutRequest, StateError, StateStoreExt,
    WatchRequest,
};

use crate::backend::Store;
use crate::watches::next;

async fn grant(store: &Store, seconds: u64) -> LeaseId {
    let request = LeaseGrantRequest::new(Duration::from_secs(seconds));
    let lease = store.lease_grant(request).await.unwrap();
    assert_eq!(lease.ttl, Duration::from_secs(seconds));
    assert!(lease.id > 0);
    lease.id
}

async fn attach(store: &Store, key: &str, lease: LeaseId) {
    store
        .put(PutRequest::new(key, "v").lease(lease))
        .await
        .unwrap();
}

pub async fn revoke_deletes_its_keys_at_once(store: &Store) {
    let lease = grant(store, 600).await;
    for key in ["k1", "k2", "k3"] {
        attach(store, key, lease).await;
    }
    store.set(b"k0", b"").await.unwrap();
    let mut watch = store.watch(WatchRequest::prefix("k")).await.unwrap();
    let revision = store.lease_revoke(lease).await.unwrap();
    assert_eq!(revision, 6);
    let batch = next(&mut watch).await.unwrap();
    assert_eq!((batch.revision, batch.events.len()), (6, 3));
    assert!(
        batch
            .events
            .iter()
            .all(|event| event.kind == EventKind::Delete)
    );
    assert_eq!(store.list(b"k").await.unwrap().kvs.len(), 1);
    let empty = grant(store, 600).await;
    assert_eq!(store.lease_revoke(empty).await.unwrap(), 6);
}

pub async fn expiry_deletes_its_keys(store: &Store) {
    let lease = grant(store, 1).await;
    let mut watch = store
        .watch(WatchRequest::prefix("k").from_revision(2))
        .await
        .unwrap();
    attach(store, "k1", lease).await;
    assert_eq!(
        next(&mut watch).await.unwrap().events[0].kind,
        EventKind::Put
    );
    let batch = next(&mut watch).await.unwrap();
    assert_eq!(batch.events[0].kind, EventKind::Delete);
    assert_eq!(store.get(b"k1").await.unwrap(), None);
    let error = store.lease_keep_alive(lease).await.unwrap_err();
    assert_eq!(error, StateError::LeaseNotFound { lease });
}

pub async fn keep_alive_gives_full_time(store: &Store) {
    let lease = grant(store, 1000).await;
    let low = loop {
        let status = store.lease_status(lease, false).await.unwrap();
        if status.remaining_ttl <= Duration::from_secs(998) {
            break status.remaining_ttl;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    // A machine that stands still may use up what one keep-alive gave.
    for attempt in 0.. {
        let kept = store.lease_keep_alive(lease).await.unwrap();
        assert_eq!((kept.id, kept.ttl), (lease, Duration::from_secs(1000)));
        let status = store.lease_status(lease, false).await.unwrap();
        if status.remaining_ttl > low {
            break;
        }
        assert!(attempt < 20, "keep-alives give nothing");
    }
}

pub async fn status_names_keys(store: &Store) {
    let lease = grant(store, 600).await;
    attach(store, "k2", lease).await;
    attach(store, "k1", lease).await;
    let status = store.lease_status(lease, true).await.unwrap();
    assert_eq!(status.keys, ["k1", "k2"]);
    assert_eq!(status.granted_ttl, Duration::from_mins(10));
    assert!(status.remaining_ttl <= status.granted_ttl);
    assert_eq!(status.revision, 3);
    let status = store.lease_status(lease, false).await.unwrap();
    assert_eq!(status.keys.len(), 0);
}

pub async fn unknown_leases_are_refused(store: &Store) {
    let unknown = StateError::LeaseNotFound { lease: 99 };
    let put = store.put(PutRequest::new("k", "").lease(99)).await;
    assert_eq!(put.unwrap_err(), unknown);
    assert_eq!(store.lease_keep_alive(99).await.unwrap_err(), unknown);
    assert_eq!(store.lease_revoke(99).await.unwrap_err(), unknown);
    assert_eq!(store.lease_status(99, true).await.unwrap_err(), unknown);
    let lease = grant(store, 600).await;
    store.lease_revoke(lease).await.unwrap();
    let gone = StateError::LeaseNotFound { lease };
    assert_eq!(store.lease_keep_alive(lease).await.unwrap_err(), gone);
    let zero = LeaseGrantRequest::new(Duration::ZERO);
    let zero = store.lease_grant(zero).await.unwrap_err();
    assert!(matches!(zero, StateError::InvalidArgument(_)), "{zero:?}");
}

pub async fn chosen_ids(store: &Store) {
    let request = LeaseGrantRequest::new(Duration::from_mins(10)).id(7);
    assert_eq!(store.lease_grant(request).await.unwrap().id, 7);
    let taken = store.lease_grant(request).await.unwrap_err();
    assert_eq!(taken, StateError::LeaseExists { lease: 7 });
    store.lease_revoke(7).await.unwrap();
    store.lease_grant(request).await.unwrap();
}

pub async fn a_put_changes_the_lease(store: &Store) {
    let (first, second) = (grant(store, 600).await, grant(store, 600).await);
    attach(store, "detached", first).await;
    attach(store, "moved", first).await;
    attach(store, "kept", first).await;
    store.set(b"detached", b"").await.unwrap();
    attach(store, "moved", second).await;
    assert_eq!(
        store.get(b"detached").await.unwrap().unwrap().lease,
        NO_LEASE
    );
    assert_eq!(store.get(b"moved").await.unwrap().unwrap().lease, second);
    store.lease_revoke(first).await.unwrap();
    let left = store.list(b"").await.unwrap().kvs;
    let left: Vec<_> = left.iter().map(|kv| &kv.key[..]).collect();
    assert_eq!(left, [&b"detached"[..], b"moved"]);
}

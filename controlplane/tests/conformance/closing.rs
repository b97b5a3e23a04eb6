use futures::StreamExt;
use keelson_controlplane::{LeaseGrantRequest, StateError, StateStoreExt, WatchRequest};
use std::time::Duration;

use crate::backend::Store;
use crate::watches::next;

pub async fn nothing_works_afterwards(store: &Store) {
    store.set(b"k", b"").await.unwrap();
    let mut watch = store.watch(WatchRequest::new("k")).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap_err(), StateError::Closed);
    assert!(watch.next().await.is_none());
    let lease = LeaseGrantRequest::new(Duration::from_mins(1));
    let errors = [
        store.get(b"k").await.unwrap_err(),
        store.set(b"k", b"").await.unwrap_err(),
        store.remove(b"k").await.unwrap_err(),
        store.watch(WatchRequest::new("k")).await.unwrap_err(),
        store.lease_grant(lease).await.unwrap_err(),
        store.lease_keep_alive(1).await.unwrap_err(),
        store.compact(1).await.unwrap_err(),
        store.status().await.unwrap_err(),
        store.close().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error, StateError::Closed);
    }
}

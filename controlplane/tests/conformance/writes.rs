use keelson_controlplane::{DeleteRequest, KeyRange, NO_LEASE, PutRequest, StateStoreExt};

use crate::backend::Store;

pub async fn revisions_and_versions(store: &Store) {
    assert_eq!(store.list(b"").await.unwrap().revision, 1);
    let created = store.set(b"k", b"1").await.unwrap();
    assert_eq!(created, 2);
    let changed = store.set(b"k", b"1").await.unwrap();
    assert_eq!(changed, 3);
    let kv = store.get(b"k").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (2, 3, 2));
    assert_eq!(kv.lease, NO_LEASE);
    store.remove(b"k").await.unwrap();
    store.set(b"k", b"2").await.unwrap();
    let kv = store.get(b"k").await.unwrap().unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (5, 5, 1));
    assert_eq!(store.status().await.unwrap().revision, 5);
}

pub async fn put_returns_the_pair_before(store: &Store) {
    let put = PutRequest::new("k", "1").prev_kv();
    assert_eq!(store.put(put).await.unwrap().prev_kv, None);
    let before = store.get(b"k").await.unwrap();
    let put = PutRequest::new("k", "2").prev_kv();
    assert_eq!(store.put(put).await.unwrap().prev_kv, before);
    let silent = PutRequest::new("k", "3");
    assert_eq!(store.put(silent).await.unwrap().prev_kv, None);
}

pub async fn delete_returns_the_pairs_before(store: &Store) {
    for key in ["k2", "k1", "l"] {
        store.set(key.as_bytes(), b"v").await.unwrap();
    }
    let before = store.list(b"k").await.unwrap();
    let response = store
        .delete(DeleteRequest::prefix("k").prev_kv())
        .await
        .unwrap();
    assert_eq!(response.deleted, 2);
    assert_eq!(response.revision, before.revision + 1);
    assert_eq!(response.prev_kvs, before.kvs);
    assert_eq!(store.list(b"").await.unwrap().kvs.len(), 1);
    let response = store
        .delete(DeleteRequest::new(KeyRange::all()))
        .await
        .unwrap();
    assert_eq!((response.deleted, response.prev_kvs.len()), (1, 0));
}

pub async fn delete_of_nothing_takes_no_revision(store: &Store) {
    let revision = store.set(b"k", b"").await.unwrap();
    let response = store.delete(DeleteRequest::new("other")).await.unwrap();
    assert_eq!((response.revision, response.deleted), (revision, 0));
    assert_eq!(store.set(b"k", b"").await.unwrap(), revision + 1);
}

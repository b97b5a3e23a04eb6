//! What only the etcd backend has: endpoints that fail, unknown outcomes, prefixes.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

#[allow(dead_code)] // Other tests use the rest.
mod etcd_server;

use std::time::Duration;

use etcd_server::{EtcdServer, free_url};
use futures::StreamExt;
use keelson_controlplane::etcd::{EtcdOptions, EtcdStore};
use keelson_controlplane::{
    DeleteRequest, KeyRange, StateError, StateStore, StateStoreExt, WatchRequest,
};

async fn store(options: EtcdOptions, timeout: u64) -> Result<EtcdStore, StateError> {
    let timeout = Duration::from_millis(timeout);
    EtcdStore::open(EtcdOptions { timeout, ..options }).await
}

#[tokio::test]
async fn nobody_there() {
    let error = store(EtcdOptions::new(vec![free_url()]), 300).await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, StateError::Unavailable(why) if why.contains("refused")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_dead_member_is_passed_over() {
    let server = EtcdServer::start().await;
    let urls = vec![free_url(), server.url().to_owned()];
    let store = store(EtcdOptions::new(urls), 20_000).await.unwrap();
    store.set(b"k", b"").await.unwrap();
    store.watch(WatchRequest::new("k")).await.unwrap();
}

#[tokio::test]
async fn a_write_without_an_answer_is_unknown_and_not_repeated() {
    let server = EtcdServer::start().await;
    let patient = store(server.options(), 20_000).await.unwrap();
    let hasty = store(server.options(), 500).await.unwrap();
    patient.set(b"k", b"0").await.unwrap();
    server.freeze(true);
    let write = hasty.set(b"k", b"1").await.unwrap_err();
    let read = hasty.get(b"k").await.unwrap_err();
    server.freeze(false);
    assert!(matches!(write, StateError::OutcomeUnknown(_)), "{write:?}");
    assert!(matches!(read, StateError::Unavailable(_)), "{read:?}");
    let kv = patient.get(b"k").await.unwrap().unwrap();
    assert!(kv.version <= 2, "{kv:?}");
}

#[tokio::test]
async fn a_write_that_reaches_nobody_is_known_not_done() {
    let mut server = EtcdServer::start().await;
    let store = store(server.options(), 500).await.unwrap();
    server.kill();
    // The first may find the lost connection; those after it find nobody.
    let _ = store.set(b"k", b"").await;
    let error = store.set(b"k", b"").await.unwrap_err();
    assert!(matches!(error, StateError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn a_watch_goes_on_after_a_crash_of_the_server() {
    let mut server = EtcdServer::start().await;
    let store = store(server.options(), 30_000).await.unwrap();
    let mut watch = store.watch(WatchRequest::new("k")).await.unwrap();
    let mut expected = Vec::new();
    let mut seen = Vec::new();
    for round in 0..3 {
        for _ in 0..5 {
            expected.push(store.set(b"k", b"").await.unwrap());
        }
        // Some are read before the crash, some after it.
        for _ in 0..2 * round {
            seen.push(watch.next().await.unwrap().unwrap().revision);
        }
        server.kill();
        server.run();
        store.get(b"k").await.unwrap();
    }
    while seen.len() < expected.len() {
        let next = tokio::time::timeout(Duration::from_secs(30), watch.next());
        seen.push(next.await.unwrap().unwrap().unwrap().revision);
    }
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_prefix_confines() {
    let server = EtcdServer::start().await;
    let whole = store(server.options(), 20_000).await.unwrap();
    let mut options = server.options();
    options.prefix = b"p/".to_vec();
    let inside = store(options, 20_000).await.unwrap();
    for key in ["o", "p", "p/1", "p/2", "p0", "q"] {
        whole.set(key.as_bytes(), b"").await.unwrap();
    }
    let names = |kvs: Vec<keelson_controlplane::KeyValue>| -> Vec<String> {
        let kvs = kvs.into_iter();
        kvs.map(|kv| String::from_utf8(kv.key.to_vec()).unwrap())
            .collect()
    };
    assert_eq!(names(inside.list(b"").await.unwrap().kvs), ["1", "2"]);
    let mut watch = inside.watch(WatchRequest::prefix("")).await.unwrap();
    whole.set(b"p0", b"").await.unwrap();
    inside.set(b"3", b"").await.unwrap();
    let batch = watch.next().await.unwrap().unwrap();
    assert_eq!(batch.events[0].kv.key, "3");
    let all = DeleteRequest::new(KeyRange::all());
    assert_eq!(inside.delete(all).await.unwrap().deleted, 3);
    assert_eq!(
        names(whole.list(b"").await.unwrap().kvs),
        ["o", "p", "p0", "q"]
    );
}

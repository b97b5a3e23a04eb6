use std::time::Duration;

use futures::StreamExt;
use keelson_controlplane::{
    DeleteRequest, EventKind, KeyRange, PutRequest, StateError, StateStoreExt, Txn, WatchBatch,
    WatchRequest, WatchStream,
};

use crate::backend::Store;

/// The next batch; the limit only keeps a broken store from hanging the test.
pub async fn next(watch: &mut WatchStream) -> Result<WatchBatch, StateError> {
    let next = tokio::time::timeout(Duration::from_secs(30), watch.next());
    next.await
        .expect("a watch is silent")
        .expect("a watch ended")
}

fn described(batch: &WatchBatch) -> Vec<String> {
    let events = batch.events.iter();
    let events = events.map(|event| {
        let kind = if event.kind == EventKind::Put {
            '+'
        } else {
            '-'
        };
        let kv = &event.kv;
        assert_eq!(kv.mod_revision, batch.revision);
        format!(
            "{kind}{}={}",
            kv.key.escape_ascii(),
            kv.value.escape_ascii()
        )
    });
    events.collect()
}

pub async fn from_now(store: &Store) {
    store.set(b"k", b"before").await.unwrap();
    let mut watch = store.watch(WatchRequest::new("k")).await.unwrap();
    let put = store.set(b"k", b"after").await.unwrap();
    store.remove(b"k").await.unwrap();
    let batch = next(&mut watch).await.unwrap();
    assert_eq!(
        (batch.revision, described(&batch)),
        (put, vec!["+k=after".into()])
    );
    assert!(!batch.events[0].is_create());
    let batch = next(&mut watch).await.unwrap();
    assert_eq!(
        (batch.revision, described(&batch)),
        (put + 1, vec!["-k=".into()])
    );
    assert_eq!(batch.events[0].kv.version, 0);
}

pub async fn from_the_past(store: &Store) {
    let snapshot = store.list(b"").await.unwrap();
    for number in 0..20 {
        store
            .set(b"k", number.to_string().as_bytes())
            .await
            .unwrap();
    }
    let request = WatchRequest::prefix("").from_revision(snapshot.revision + 1);
    let mut watch = store.watch(request).await.unwrap();
    for number in 0..20 {
        let batch = next(&mut watch).await.unwrap();
        assert_eq!(batch.revision, snapshot.revision + 1 + number);
        assert_eq!(described(&batch), [format!("+k={number}")]);
    }
    let live = store.set(b"k", b"live").await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().revision, live);
}

pub async fn from_the_future(store: &Store) {
    let revision = store.set(b"k", b"").await.unwrap();
    let request = WatchRequest::new("k").from_revision(revision + 3);
    let mut watch = store.watch(request).await.unwrap();
    for _ in 0..4 {
        store.set(b"k", b"").await.unwrap();
    }
    assert_eq!(next(&mut watch).await.unwrap().revision, revision + 3);
    assert_eq!(next(&mut watch).await.unwrap().revision, revision + 4);
}

pub async fn only_the_range(store: &Store) {
    let mut prefix = store.watch(WatchRequest::prefix("k/")).await.unwrap();
    let mut range = store
        .watch(WatchRequest::new(KeyRange::range("a", "c")))
        .await
        .unwrap();
    for key in ["k", "b", "k/1", "c", "k0", "a", "k/"] {
        store.set(key.as_bytes(), b"").await.unwrap();
    }
    for expected in ["+k/1=", "+k/="] {
        assert_eq!(described(&next(&mut prefix).await.unwrap()), [expected]);
    }
    for expected in ["+b=", "+a="] {
        assert_eq!(described(&next(&mut range).await.unwrap()), [expected]);
    }
}

pub async fn pairs_before(store: &Store) {
    let start = store.list(b"").await.unwrap().revision + 1;
    let live = WatchRequest::new("k").prev_kv();
    let mut live = store.watch(live).await.unwrap();
    store.set(b"k", b"1").await.unwrap();
    let first = store.get(b"k").await.unwrap();
    store.set(b"k", b"2").await.unwrap();
    let second = store.get(b"k").await.unwrap();
    store.remove(b"k").await.unwrap();
    let past = WatchRequest::new("k").prev_kv().from_revision(start);
    let mut past = store.watch(past).await.unwrap();
    for watch in [&mut live, &mut past] {
        for expected in [None, first.clone(), second.clone()] {
            assert_eq!(next(watch).await.unwrap().events[0].prev_kv, expected);
        }
    }
    let mut plain = store
        .watch(WatchRequest::new("k").from_revision(start + 1))
        .await
        .unwrap();
    assert_eq!(next(&mut plain).await.unwrap().events[0].prev_kv, None);
}

pub async fn a_transaction_is_one_batch(store: &Store) {
    store.set(b"k9", b"").await.unwrap();
    store.set(b"k8", b"").await.unwrap();
    let mut watch = store.watch(WatchRequest::prefix("k")).await.unwrap();
    let txn = Txn::new().then([
        PutRequest::new("k2", "b").into(),
        PutRequest::new("other", "").into(),
        DeleteRequest::new(KeyRange::range("k8", "l")).into(),
        PutRequest::new("k1", "a").into(),
    ]);
    let revision = store.txn(txn).await.unwrap().revision;
    let batch = next(&mut watch).await.unwrap();
    assert_eq!(batch.revision, revision);
    assert_eq!(described(&batch), ["+k2=b", "-k8=", "-k9=", "+k1=a"]);
}

/// Revisions of which some don't fit into one message of etcd's, and which outgrow every buffer on
/// the way to a reader that doesn't read.
pub async fn slow_reader_misses_nothing(store: &Store) {
    let mut watch = store.watch(WatchRequest::prefix("k")).await.unwrap();
    let value = vec![b'v'; 100_000];
    for number in 0..100 {
        store
            .set(format!("k{number}").as_bytes(), &value)
            .await
            .unwrap();
    }
    // On the same store while the watch is full.
    let deleted = store.delete(DeleteRequest::prefix("k")).await.unwrap();
    assert_eq!(deleted.deleted, 100);
    for number in 0..100 {
        let batch = next(&mut watch).await.unwrap();
        assert_eq!(batch.revision, 2 + number);
        assert_eq!(batch.events[0].kv.value.len(), value.len());
    }
    let batch = next(&mut watch).await.unwrap();
    assert_eq!((batch.revision, batch.events.len()), (102, 100));
    let request = WatchRequest::prefix("k").prev_kv().from_revision(102);
    let mut again = store.watch(request).await.unwrap();
    let batch = next(&mut again).await.unwrap();
    let sizes = batch
        .events
        .iter()
        .map(|event| event.prev_kv.as_ref().unwrap().value.len());
    assert_eq!(
        (batch.events.len(), sizes.sum::<usize>()),
        (100, 10_000_000)
    );
}

pub async fn progress(store: &Store) {
    let mut watch = store
        .watch(WatchRequest::new("k").progress())
        .await
        .unwrap();
    let revision = store.set(b"unwatched", b"").await.unwrap();
    loop {
        let batch = next(&mut watch).await.unwrap();
        assert_eq!(batch.events.len(), 0);
        assert!(batch.revision <= revision);
        if batch.revision == revision {
            break;
        }
    }
}

pub async fn empty_range_is_refused(store: &Store) {
    let request = WatchRequest::new(KeyRange::range("b", "a"));
    let error = store.watch(request).await.unwrap_err();
    assert!(matches!(error, StateError::InvalidArgument(_)), "{error:?}");
}

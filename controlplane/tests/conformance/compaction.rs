use keelson_controlplane::{StateError, StateStoreExt, WatchRequest};

use crate::backend::Store;
use crate::watches::next;

/// Sets `k` to 2, 3, … at those revisions.
async fn fill(store: &Store, last: i64) {
    for revision in 2..=last {
        let value = revision.to_string();
        assert_eq!(store.set(b"k", value.as_bytes()).await.unwrap(), revision);
    }
}

pub async fn old_revisions_are_gone(store: &Store) {
    fill(store, 6).await;
    assert_eq!(store.compact(4).await.unwrap(), 6);
    let error = store.get_at(b"k", 3).await.unwrap_err();
    assert!(
        matches!(error, StateError::Compacted { requested: 3, .. }),
        "{error:?}"
    );
    for revision in 4..=6 {
        let kv = store.get_at(b"k", revision).await.unwrap().unwrap();
        assert_eq!(kv.value, revision.to_string());
        assert_eq!((kv.create_revision, kv.version), (2, revision - 1));
    }
}

pub async fn watches_of_the_past_end(store: &Store) {
    fill(store, 6).await;
    store.compact(4).await.unwrap();
    let error = match store.watch(WatchRequest::new("k").from_revision(3)).await {
        Ok(mut watch) => next(&mut watch).await.unwrap_err(),
        Err(error) => error,
    };
    let expected = StateError::Compacted {
        requested: 3,
        compact_revision: 4,
    };
    assert_eq!(error, expected);
    let mut watch = store
        .watch(WatchRequest::new("k").from_revision(4))
        .await
        .unwrap();
    for revision in 4..=6 {
        assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    }
}

pub async fn refused_revisions(store: &Store) {
    fill(store, 6).await;
    let future = store.compact(7).await.unwrap_err();
    assert!(
        matches!(future, StateError::FutureRevision { requested: 7, .. }),
        "{future:?}"
    );
    store.compact(5).await.unwrap();
    for again in [5, 2] {
        let error = store.compact(again).await.unwrap_err();
        assert!(
            matches!(error, StateError::Compacted { requested, .. } if requested == again),
            "{error:?}"
        );
    }
    let zero = store.compact(0).await.unwrap_err();
    assert!(matches!(zero, StateError::InvalidArgument(_)), "{zero:?}");
}

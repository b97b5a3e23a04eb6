use keelson_controlplane::limits::{MAX_KEY_BYTES, MAX_REQUEST_BYTES, MAX_TXN_OPS};
use keelson_controlplane::{Compare, PutRequest, StateError, StateStoreExt, Txn, TxnOp};

use crate::backend::Store;

pub async fn keys(store: &Store) {
    let empty = store.set(b"", b"").await.unwrap_err();
    assert!(matches!(empty, StateError::InvalidArgument(_)), "{empty:?}");
    let longest = vec![b'k'; MAX_KEY_BYTES];
    store.set(&longest, b"").await.unwrap();
    assert!(store.get(&longest).await.unwrap().is_some());
    let long = vec![b'k'; MAX_KEY_BYTES + 1];
    for error in [
        store.set(&long, b"").await.unwrap_err(),
        store.get(&long).await.unwrap_err(),
        store.remove(&long).await.unwrap_err(),
    ] {
        assert!(matches!(error, StateError::TooLarge { .. }), "{error:?}");
    }
}

pub async fn values(store: &Store) {
    let largest = vec![0; MAX_REQUEST_BYTES - 1];
    store.set(b"k", &largest).await.unwrap();
    assert_eq!(store.get(b"k").await.unwrap().unwrap().value, largest);
    let large = vec![0; MAX_REQUEST_BYTES];
    let error = store.set(b"k", &large).await.unwrap_err();
    assert!(matches!(error, StateError::TooLarge { .. }), "{error:?}");
    // More in one answer than a gRPC client accepts by default.
    for key in [b"l", b"m", b"n"] {
        store.set(key, &largest).await.unwrap();
    }
    assert_eq!(store.list(b"").await.unwrap().kvs.len(), 4);
}

pub async fn operations(store: &Store) {
    let puts = |count: usize| -> Vec<TxnOp> {
        let keys = (0..count).map(|number| format!("k{number}"));
        keys.map(|key| PutRequest::new(key, "").into()).collect()
    };
    let full = Txn::new().then(puts(MAX_TXN_OPS));
    assert_eq!(store.txn(full).await.unwrap().results.len(), MAX_TXN_OPS);
    let compares = vec![Compare::missing("k"); MAX_TXN_OPS + 1];
    for txn in [
        Txn::new().then(puts(MAX_TXN_OPS + 1)),
        Txn::new().when(compares),
    ] {
        let error = store.txn(txn).await.unwrap_err();
        assert!(matches!(error, StateError::TooLarge { .. }), "{error:?}");
    }
    let value = vec![0; MAX_REQUEST_BYTES / 2];
    let large = ["a", "b"].map(|key| PutRequest::new(key, value.clone()).into());
    let error = store.txn(Txn::new().then(large)).await.unwrap_err();
    assert!(matches!(error, StateError::TooLarge { .. }), "{error:?}");
    assert_eq!(store.get(b"a").await.unwrap(), None);
}

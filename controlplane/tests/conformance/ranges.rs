use keelson_controlplane::{KeyRange, KeyValue, RangeRequest, StateError, StateStoreExt};

use crate::backend::Store;

async fn fill(store: &Store, keys: &[&str]) {
    for key in keys {
        store.set(key.as_bytes(), key.as_bytes()).await.unwrap();
    }
}

async fn keys(store: &Store, range: KeyRange) -> Vec<String> {
    names(&store.range(RangeRequest::new(range)).await.unwrap().kvs)
}

fn names(kvs: &[KeyValue]) -> Vec<String> {
    let names = kvs
        .iter()
        .map(|kv| String::from_utf8(kv.key.to_vec()).unwrap());
    names.collect()
}

pub async fn kinds_of_ranges(store: &Store) {
    fill(store, &["b/2", "a", "c", "b/1", "b0", "b"]).await;
    assert_eq!(keys(store, KeyRange::key("b")).await, ["b"]);
    assert_eq!(keys(store, KeyRange::prefix("b/")).await, ["b/1", "b/2"]);
    assert_eq!(
        keys(store, KeyRange::range("b", "b0")).await,
        ["b", "b/1", "b/2"]
    );
    assert_eq!(keys(store, KeyRange::from("b0")).await, ["b0", "c"]);
    let all = ["a", "b", "b/1", "b/2", "b0", "c"];
    assert_eq!(keys(store, KeyRange::all()).await, all);
    assert_eq!(keys(store, KeyRange::prefix("")).await, all);
    assert_eq!(keys(store, KeyRange::range("", "b")).await, ["a"]);
    assert_eq!(keys(store, KeyRange::key("nothing")).await, [""; 0]);
}

pub async fn empty_ranges_hold_nothing(store: &Store) {
    fill(store, &["a", "b"]).await;
    for (start, end) in [
        ("", ""),
        ("", "\0"),
        ("a", ""),
        ("a", "\0"),
        ("b", "a"),
        ("a", "a"),
    ] {
        let range = KeyRange::range(start, end);
        assert_eq!(keys(store, range.clone()).await, [""; 0], "{range:?}");
        let request = keelson_controlplane::DeleteRequest::new(range.clone());
        assert_eq!(store.delete(request).await.unwrap().deleted, 0, "{range:?}");
    }
    assert_eq!(keys(store, KeyRange::all()).await, ["a", "b"]);
}

pub async fn limit_counts_what_it_leaves_out(store: &Store) {
    fill(store, &["k1", "k2", "k3"]).await;
    for (limit, found, more) in [(1, 1, true), (2, 2, true), (3, 3, false), (4, 3, false)] {
        let request = RangeRequest::prefix("k").limit(limit);
        let response = store.range(request).await.unwrap();
        assert_eq!(
            (response.kvs.len(), response.more),
            (found, more),
            "{limit}"
        );
        assert_eq!(response.count, 3);
    }
    let mut request = RangeRequest::prefix("k");
    request.limit = Some(0);
    assert_eq!(store.range(request).await.unwrap().kvs.len(), 3);
}

pub async fn keys_only_and_count_only(store: &Store) {
    fill(store, &["k1", "k2"]).await;
    let response = store
        .range(RangeRequest::prefix("k").keys_only())
        .await
        .unwrap();
    assert!(response.kvs.iter().all(|kv| kv.value.is_empty()));
    assert_eq!(names(&response.kvs), ["k1", "k2"]);
    let request = RangeRequest::prefix("k").count_only().limit(1);
    let response = store.range(request).await.unwrap();
    assert_eq!(
        (response.kvs.len(), response.count, response.more),
        (0, 2, false)
    );
}

pub async fn state_at_an_old_revision(store: &Store) {
    let first = store.set(b"k", b"1").await.unwrap();
    let second = store.set(b"k", b"2").await.unwrap();
    store.remove(b"k").await.unwrap();
    let last = store.set(b"other", b"").await.unwrap();
    for (revision, value) in [
        (1, None),
        (first, Some("1")),
        (second, Some("2")),
        (last, None),
    ] {
        let kv = store.get_at(b"k", revision).await.unwrap();
        let found = kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap());
        assert_eq!(found.as_deref(), value, "{revision}");
    }
    let old = RangeRequest::new("k").at(first);
    assert_eq!(store.range(old).await.unwrap().revision, last);
    let future = store.get_at(b"k", last + 1).await.unwrap_err();
    assert!(
        matches!(future, StateError::FutureRevision { requested, .. } if requested == last + 1),
        "{future:?}"
    );
    let zero = store.get_at(b"k", 0).await.unwrap_err();
    assert!(matches!(zero, StateError::InvalidArgument(_)), "{zero:?}");
}

pub async fn keys_are_bytes(store: &Store) {
    let sorted: [&[u8]; 5] = [&[0], &[0, 0], &[1, 0xff], &[0xff], &[0xff, 0xff]];
    for key in sorted.iter().rev() {
        store.set(key, &[0, 0xff]).await.unwrap();
    }
    let found = store.list(b"").await.unwrap().kvs;
    let found: Vec<_> = found.iter().map(|kv| &kv.key[..]).collect();
    assert_eq!(found, sorted);
    let found = store.list(&[0xff]).await.unwrap().kvs;
    assert_eq!(found.len(), 2);
}

pub async fn pages_of_one_revision(store: &Store) {
    fill(store, &["k1", "k2", "k3"]).await;
    let first = store
        .range(RangeRequest::prefix("k").limit(2))
        .await
        .unwrap();
    store.remove(b"k3").await.unwrap();
    let rest = KeyRange::prefix("k").after(&first.kvs[1].key);
    let request = RangeRequest::new(rest).at(first.revision);
    assert_eq!(names(&store.range(request).await.unwrap().kvs), ["k3"]);
}

use std::sync::Arc;

use keelson_controlplane::{StateStoreExt, Swap};

use crate::backend::Store;

const TASKS: usize = 16;

pub async fn one_of_many_wins(store: &Store) {
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let store = Arc::clone(store);
            tokio::spawn(async move { store.create(b"k", task.to_string().as_bytes()).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (number, task) in tasks.into_iter().enumerate() {
        match task.await.unwrap().unwrap() {
            Swap::Done(_) => winners.push(number),
            Swap::Conflict(kv) => assert!(kv.is_some()),
        }
    }
    assert_eq!(winners.len(), 1);
    let kv = store.get(b"k").await.unwrap().unwrap();
    assert_eq!(kv.value, winners[0].to_string());
    assert_eq!(kv.version, 1);
}

pub async fn no_increment_is_lost(store: &Store) {
    const INCREMENTS: i64 = 5;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let store = Arc::clone(store);
            tokio::spawn(async move {
                for _ in 0..INCREMENTS {
                    store
                        .modify(b"counter", |kv| {
                            let text = kv.map_or("0".into(), |kv| {
                                String::from_utf8(kv.value.to_vec()).unwrap()
                            });
                            Some((text.parse::<i64>().unwrap() + 1).to_string().into())
                        })
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let kv = store.get(b"counter").await.unwrap().unwrap();
    let total = i64::try_from(TASKS).unwrap() * INCREMENTS;
    assert_eq!((kv.value, kv.version), (total.to_string().into(), total));
}

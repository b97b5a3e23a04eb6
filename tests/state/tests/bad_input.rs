//! What a server has to live through.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program, Random};
use pb::kv_client::KvClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tonic::Code;
use tonic::transport::Channel;

/// Random bytes, and the start of HTTP/2 with random bytes behind it, on every port.
#[tokio::test]
async fn garbage_on_the_wire() {
    let cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let mut random = Random::new(1);
    for round in 0..60 {
        for url in [cluster.client_url(round % 3), cluster.peer_url(round % 3)] {
            let address = url.strip_prefix("http://").unwrap();
            let mut stream = TcpStream::connect(address).unwrap();
            let mut bytes = match round % 3 {
                0 => Vec::new(),
                1 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
                _ => b"POST /etcdserverpb.KV/Put HTTP/1.1\r\n".to_vec(),
            };
            bytes.extend((0..random.below(4000)).map(|_| random.number().to_le_bytes()[0]));
            // The server may close it before everything is sent.
            let _ = stream.write_all(&bytes);
        }
    }
    for at in 0..3 {
        cluster.wait_for(at).await;
    }
}

/// A request that is too large, one with too many operations, and one that is nested too deeply.
#[tokio::test]
async fn requests_that_are_too_large() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut kv = KvClient::new(cluster.connect(0).await);
    let put = |bytes: usize| pb::PutRequest {
        key: "key".into(),
        value: vec![0; bytes].into(),
        ..pb::PutRequest::default()
    };
    kv.put(put(1_500_000)).await.unwrap();
    let large = kv.put(put(1_600_000)).await.unwrap_err();
    assert_eq!(large.message(), "etcdserver: request is too large");
    assert_eq!(large.code(), Code::InvalidArgument);
    let huge = kv.put(put(50_000_000)).await.unwrap_err();
    assert!(
        matches!(huge.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{huge:?}"
    );
    let operation = |request| pb::RequestOp {
        request: Some(request),
    };
    let many = pb::TxnRequest {
        success: (0..129)
            .map(|_| operation(pb::request_op::Request::RequestPut(put(1))))
            .collect(),
        ..pb::TxnRequest::default()
    };
    let many = kv.txn(many).await.unwrap_err();
    assert_eq!(
        many.message(),
        "etcdserver: too many operations in txn request"
    );
    let mut nested = pb::TxnRequest::default();
    for _ in 0..200 {
        nested = pb::TxnRequest {
            success: vec![operation(pb::request_op::Request::RequestTxn(nested))],
            ..pb::TxnRequest::default()
        };
    }
    kv.txn(nested).await.unwrap_err();
    cluster.wait_for(0).await;
}

/// A client that watches and never reads: the server does not keep everything for it, and others
/// don't wait for it.
#[tokio::test]
async fn a_client_that_never_reads() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut kv = KvClient::new(cluster.connect(0).await);
    // What the same writes take without anybody who watches.
    put_many(&mut kv).await;
    let before = cluster.resident_bytes(0);
    let create = pb::WatchCreateRequest {
        key: "key".into(),
        ..pb::WatchCreateRequest::default()
    };
    let request = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    // So many that what they would hold stands out from changes that are not flushed yet.
    let mut clients = Vec::new();
    for _ in 0..SILENT_CLIENTS {
        let requests = tokio_stream::once(request.clone());
        let requests = futures::StreamExt::chain(requests, tokio_stream::pending());
        let watch = WatchClient::new(cluster.connect(0).await)
            .watch(requests)
            .await;
        clients.push(watch.unwrap().into_inner());
    }
    let mut silent = clients.pop().unwrap();
    let created = silent.message().await.unwrap().unwrap();
    let mut revision = created.header.unwrap().revision;
    let last = put_many(&mut kv).await;
    let more = cluster.resident_bytes(0).saturating_sub(before);
    assert!(
        more < 300_000_000,
        "{more} bytes more for 60 MB of events for each of {SILENT_CLIENTS} clients"
    );
    // As soon as it reads, it gets every event, in order.
    while revision < last {
        let response = silent.message().await.unwrap().unwrap();
        for event in response.events {
            let next = event.kv.unwrap().mod_revision;
            assert_eq!(next, revision + 1, "an event was skipped");
            revision = next;
        }
    }
}

/// Clients that watch and do not read.
const SILENT_CLIENTS: usize = 20;

/// Puts 60 MB into one key; the last revision.
async fn put_many(kv: &mut KvClient<Channel>) -> i64 {
    let mut revision = 0;
    for _ in 0..600 {
        let put = pb::PutRequest {
            key: "key".into(),
            value: vec![0; 100_000].into(),
            ..pb::PutRequest::default()
        };
        let put = tokio::time::timeout(Duration::from_secs(10), kv.put(put)).await;
        let put = put.expect("a put waits for who does not read").unwrap();
        revision = put.into_inner().header.unwrap().revision;
    }
    revision
}

/// Files of another member, another cluster, or a newer version.
#[tokio::test]
async fn files_of_others() {
    let mut one = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut two = Cluster::start(Program::KeelsonState, 1, &[]).await;
    one.kill(0);
    two.kill(0);
    for (file, told) in [
        ("keyspace.redb", "the data belongs to cluster"),
        ("log-0000000000000001", "belongs to member"),
    ] {
        let own = one.data(0).join(file);
        let kept = fs::read(&own).unwrap();
        fs::copy(two.data(0).join(file), &own).unwrap();
        one.run(0);
        let log = one.end_of(0).await;
        assert!(log.contains(told), "{file}: {log}");
        fs::write(&own, kept).unwrap();
    }
    let identity = one.data(0).join("identity");
    fs::remove_file(one.data(0).join("identity.copy")).unwrap();
    let kept = fs::read(&identity).unwrap();
    // Its first field is the format, 2.
    let mut newer = kept[..kept.len() - 4].to_vec();
    assert_eq!(newer[..2], [8, 2]);
    newer[1] = 9;
    newer.extend(crc32fast::hash(&newer).to_le_bytes());
    fs::write(&identity, &newer).unwrap();
    one.run(0);
    let log = one.end_of(0).await;
    assert!(log.contains("has format 9, this version knows 2"), "{log}");
    newer[3] ^= 1;
    fs::write(&identity, &newer).unwrap();
    one.run(0);
    let log = one.end_of(0).await;
    assert!(log.contains("fails its checksum"), "{log}");
    fs::write(&identity, &kept).unwrap();
    one.run(0);
    one.wait_for(0).await;
}

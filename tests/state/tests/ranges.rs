//! Ranges of any size: streams, limits of memory.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb::KeyValue;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::range_request::{SortOrder, SortTarget};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A stream's parts are, merged, what Range answers.
#[tokio::test]
async fn a_stream_is_the_same_range() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut kv = client(&cluster).await;
    // More than one part, by bytes and by keys; versions and deletions among them.
    let length = |number| if number % 20 == 0 { 20_000 } else { 3 };
    put_all(&mut kv, (0..6000).map(|number| (number, length(number)))).await;
    put_all(&mut kv, (0..6000).step_by(7).map(|number| (number, 5))).await;
    for number in 0..200 {
        put(&mut kv, number, 7).await;
    }
    let delete = pb::DeleteRangeRequest {
        key: "key-001".into(),
        range_end: "key-002".into(),
        ..pb::DeleteRangeRequest::default()
    };
    kv.delete_range(delete).await.unwrap();
    let all = pb::RangeRequest {
        key: "key-".into(),
        range_end: "key.".into(),
        ..pb::RangeRequest::default()
    };
    let requests = [
        all.clone(),
        pb::RangeRequest {
            limit: 1,
            ..all.clone()
        },
        pb::RangeRequest {
            limit: 5,
            ..all.clone()
        },
        pb::RangeRequest {
            limit: 4999,
            ..all.clone()
        },
        pb::RangeRequest {
            limit: 5000,
            ..all.clone()
        },
        pb::RangeRequest {
            keys_only: true,
            limit: 4500,
            ..all.clone()
        },
        pb::RangeRequest {
            count_only: true,
            ..all.clone()
        },
        pb::RangeRequest {
            revision: 100,
            ..all.clone()
        },
        pb::RangeRequest {
            min_mod_revision: 61,
            ..all.clone()
        },
        pb::RangeRequest {
            max_mod_revision: 5,
            limit: 10,
            ..all.clone()
        },
        pb::RangeRequest {
            min_create_revision: 59,
            serializable: true,
            ..all.clone()
        },
        pb::RangeRequest {
            sort_order: SortOrder::Ascend as i32,
            ..all.clone()
        },
        pb::RangeRequest {
            key: "key-0003".into(),
            range_end: "".into(),
            ..all.clone()
        },
        pb::RangeRequest {
            key: "nothing".into(),
            range_end: "".into(),
            ..all.clone()
        },
    ];
    for request in requests {
        let whole = kv.range(request.clone()).await.unwrap().into_inner();
        let (merged, parts) = merged(&mut kv, request.clone()).await.unwrap();
        assert_eq!(merged, whole, "{request:?}");
        if request == all {
            assert!(parts > 5, "{parts} parts of {} bytes", size(&whole.kvs));
        }
    }
    for request in [
        pb::RangeRequest {
            sort_order: SortOrder::Descend as i32,
            ..all.clone()
        },
        pb::RangeRequest {
            sort_target: SortTarget::Mod as i32,
            ..all.clone()
        },
    ] {
        let refusal = merged(&mut kv, request).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument);
    }
    for (request, told) in [
        (
            pb::RangeRequest {
                revision: 1 << 40,
                ..all.clone()
            },
            "future revision",
        ),
        (
            pb::RangeRequest {
                key: "".into(),
                ..all.clone()
            },
            "key is not provided",
        ),
    ] {
        let refusal = merged(&mut kv, request).await.unwrap_err();
        assert!(refusal.message().contains(told), "{refusal:?}");
    }
}

/// However much is asked for at once, the server's memory has a limit; what is too large for one
/// answer is streamed.
#[tokio::test]
async fn huge_ranges_have_a_limit_of_memory() {
    const VALUE: usize = 1_000_000;
    const COUNT: u32 = 60;
    let limit = (COUNT as usize * VALUE * 2 / 3).to_string();
    let flags = [
        "--max-response-bytes",
        &limit,
        "--max-request-bytes",
        "2000000",
    ];
    let cluster = Cluster::start(Program::KeelsonState, 1, &flags).await;
    let mut kv = client(&cluster).await;
    for number in 0..COUNT {
        put(&mut kv, number, VALUE).await;
    }
    let range = |end: &str| pb::RangeRequest {
        key: "key-".into(),
        range_end: end.to_owned().into(),
        ..pb::RangeRequest::default()
    };
    let refusal = kv.range(range("key.")).await.unwrap_err();
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert!(refusal.message().contains("RangeStream"), "{refusal:?}");

    // Half of it is allowed; 48 at once would be 1.4 GB, twice, for they are encoded.
    let half = format!("key-{:04}", COUNT / 2);
    let before = cluster.resident_bytes(0);
    let mut asking = Vec::new();
    for _ in 0..48 {
        let (range, mut kv) = (range(&half), client(&cluster).await);
        asking.push(tokio::spawn(async move {
            let answer = kv.range(range).await.unwrap().into_inner();
            assert_eq!(answer.kvs.len(), COUNT as usize / 2);
        }));
    }
    let mut most = 0;
    for asked in asking {
        while !asked.is_finished() {
            most = most.max(cluster.resident_bytes(0));
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        asked.await.unwrap();
    }
    let more = most.saturating_sub(before);
    assert!(
        more < 330_000_000,
        "{more} bytes more for 48 answers of 30 MB"
    );

    let (merged, parts) = merged(&mut kv, range("key.")).await.unwrap();
    assert_eq!(size(&merged.kvs), COUNT as usize * (VALUE + 8));
    assert!(parts > COUNT / 2, "{parts} parts");
}

/// A range that takes long to read is of one revision, whatever is written meanwhile.
#[tokio::test]
async fn a_long_range_is_of_one_revision() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut kv = client(&cluster).await;
    put_all(&mut kv, (0..30_000).map(|number| (number, 1))).await;
    let writer = {
        let mut kv = kv.clone();
        tokio::spawn(async move {
            for round in 0_u32.. {
                // The first key, then the last: a range that sees the last one's sees the first one's.
                put(&mut kv, 0, 10 + round as usize).await;
                put(&mut kv, 29_999, 10 + round as usize).await;
                if round % 10 == 0 {
                    let revision = kv.range(single(0)).await.unwrap().into_inner();
                    let revision = revision.header.unwrap().revision;
                    let compaction = pb::CompactionRequest {
                        revision,
                        physical: false,
                    };
                    kv.compact(compaction).await.unwrap();
                }
            }
        })
    };
    for _ in 0..20 {
        let all = pb::RangeRequest {
            key: "key-".into(),
            range_end: "key.".into(),
            ..pb::RangeRequest::default()
        };
        let answer = kv.range(all).await.unwrap().into_inner();
        assert_eq!(answer.count, 30_000);
        let (first, last) = (&answer.kvs[0], answer.kvs.last().unwrap());
        let lengths = (first.value.len(), last.value.len());
        assert!(
            lengths.0 == lengths.1 || lengths.0 == lengths.1 + 1 || lengths.1 == 1,
            "{lengths:?} at {:?}",
            answer.header
        );
    }
    writer.abort();
}

fn single(number: u32) -> pb::RangeRequest {
    pb::RangeRequest {
        key: format!("key-{number:04}").into(),
        ..pb::RangeRequest::default()
    }
}

async fn client(cluster: &Cluster) -> KvClient<Channel> {
    KvClient::new(cluster.connect(0).await).max_decoding_message_size(1 << 30)
}

async fn put(kv: &mut KvClient<Channel>, number: u32, length: usize) {
    let request = pb::PutRequest {
        key: format!("key-{number:04}").into(),
        value: vec![b'v'; length].into(),
        ..pb::PutRequest::default()
    };
    kv.put(request).await.unwrap();
}

/// Puts values of some lengths, in few transactions.
async fn put_all(kv: &mut KvClient<Channel>, pairs: impl Iterator<Item = (u32, usize)>) {
    let operations: Vec<_> = pairs
        .map(|(number, length)| pb::RequestOp {
            request: Some(pb::request_op::Request::RequestPut(pb::PutRequest {
                key: format!("key-{number:04}").into(),
                value: vec![b'v'; length].into(),
                ..pb::PutRequest::default()
            })),
        })
        .collect();
    for operations in operations.chunks(100) {
        let txn = pb::TxnRequest {
            success: operations.to_vec(),
            ..pb::TxnRequest::default()
        };
        kv.txn(txn).await.unwrap();
    }
}

/// A stream's parts in one answer, as protobuf merges them; and how many there were.
async fn merged(
    kv: &mut KvClient<Channel>,
    request: pb::RangeRequest,
) -> Result<(pb::RangeResponse, u32), Status> {
    let mut stream = kv.range_stream(request).await?.into_inner();
    let mut merged = pb::RangeResponse::default();
    let mut parts = 0;
    while let Some(part) = stream.message().await? {
        let part = part.range_response.unwrap();
        parts += 1;
        merged.kvs.extend(part.kvs);
        merged.count += part.count;
        merged.more |= part.more;
        if let Some(header) = part.header {
            let whole = merged.header.get_or_insert_default();
            whole.cluster_id |= header.cluster_id;
            whole.member_id |= header.member_id;
            whole.raft_term |= header.raft_term;
            whole.revision |= header.revision;
        }
    }
    Ok((merged, parts))
}

fn size(kvs: &[KeyValue]) -> usize {
    kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum()
}

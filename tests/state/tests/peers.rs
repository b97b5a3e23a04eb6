//! A peer that speaks garbage, or lies: it is cut off, or told that it is wrong, and the cluster goes on.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::{PeerMessage, encode_message};
use keelson_state_tests::{Cluster, Program, Random};
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use raft::eraftpb::{Entry, MessageType};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// What tonic generates from `peer.proto`.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
mod proto {
    tonic::include_proto!("keelson.state.v1");
}
use proto::peer_client::PeerClient;

/// The member that is lied to.
const TARGET: usize = 0;

/// A cluster, and somebody who reaches its members as one of them would.
struct Liar {
    cluster: Cluster,
    client: PeerClient<Channel>,
    cluster_id: u64,
    /// In the order of the members' names.
    ids: Vec<u64>,
}

impl Liar {
    async fn new() -> Self {
        let cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
        let url = cluster.peer_url(TARGET).to_owned();
        let channel = Endpoint::from_shared(url).unwrap().connect_lazy();
        let mut client = PeerClient::new(channel);
        let request = proto::MembershipRequest {};
        let known = client.membership(request).await.unwrap().into_inner();
        let id_at = |url: &str| {
            let mut members = known.members.iter();
            let found = members.find(|member| member.peer_urls == [url]);
            found.unwrap().id
        };
        Self {
            ids: (0..3).map(|at| id_at(cluster.peer_url(at))).collect(),
            cluster,
            client,
            cluster_id: known.cluster_id,
        }
    }

    /// From the second member to the first.
    fn message(&self, kind: MessageType, term: u64) -> PeerMessage {
        PeerMessage {
            msg_type: kind.into(),
            from: self.ids[1],
            to: self.ids[TARGET],
            term,
            ..PeerMessage::default()
        }
    }

    fn piece(&self, messages: Vec<Vec<u8>>) -> proto::Messages {
        proto::Messages {
            cluster_id: self.cluster_id,
            messages,
            from: self.ids[1],
            url: self.cluster.peer_url(1).to_owned(),
        }
    }

    /// Sends it in a stream that would stay open: how the member ends it.
    async fn told(&mut self, piece: proto::Messages) -> Status {
        let pieces = futures::StreamExt::chain(tokio_stream::once(piece), tokio_stream::pending());
        let call = self.client.exchange(pieces);
        let ended = tokio::time::timeout(Duration::from_mins(1), call).await;
        ended.expect("it is not cut off").unwrap_err()
    }

    /// The cluster reads and writes, in a term that elections may have led to, and all hold the same.
    async fn check(&self, number: u32) {
        let mut hashes = Vec::new();
        let put = pb::PutRequest {
            key: "key".into(),
            value: number.to_string().into(),
            ..pb::PutRequest::default()
        };
        self.cluster.wait_for(TARGET).await;
        let mut kv = KvClient::new(self.cluster.connect(TARGET).await);
        kv.put(put).await.unwrap();
        for at in 0..3 {
            self.cluster.wait_for(at).await;
            let mut client = MaintenanceClient::new(self.cluster.connect(at).await);
            let status = client.status(pb::StatusRequest {}).await.unwrap();
            assert!(status.into_inner().raft_term < 1000);
            hashes.push(self.cluster.hash(at).await);
        }
        assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
        let log = self.cluster.log_of(TARGET);
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[tokio::test]
async fn who_speaks_garbage_is_cut_off() {
    let mut liar = Liar::new().await;
    let mut random = Random::new(4);
    for number in 0..20 {
        let length = random.below(200) + 1;
        let garbage = (0..length).map(|_| random.number().to_le_bytes()[0] | 0x80);
        let told = liar.told(liar.piece(vec![garbage.collect()])).await;
        assert_eq!(told.code(), Code::InvalidArgument, "{told:?}");
        liar.check(number).await;
    }
    // A message that is cut off, and one that is none.
    let whole = encode_message(&liar.message(MessageType::MsgHeartbeat, 1));
    for bytes in [whole[..whole.len() - 1].to_vec(), Vec::new()] {
        let told = liar.told(liar.piece(vec![bytes])).await;
        assert_eq!(told.code(), Code::InvalidArgument, "{told:?}");
    }
    let log = liar.cluster.log_of(TARGET);
    assert!(log.contains("cut off a member"), "{log}");
}

#[tokio::test]
async fn who_lies_is_cut_off() {
    let mut liar = Liar::new().await;
    let of_another = PeerMessage {
        from: liar.ids[2],
        ..liar.message(MessageType::MsgHeartbeat, 5)
    };
    let for_another = PeerMessage {
        to: liar.ids[2],
        ..liar.message(MessageType::MsgHeartbeat, 5)
    };
    let of_itself = PeerMessage {
        from: liar.ids[TARGET],
        ..liar.message(MessageType::MsgHeartbeat, 5)
    };
    let entries_of_later = PeerMessage {
        entries: vec![Entry {
            index: 1,
            term: 9,
            ..Entry::default()
        }],
        ..liar.message(MessageType::MsgAppend, 5)
    };
    let of_no_end = PeerMessage {
        commit: u64::MAX,
        ..liar.message(MessageType::MsgHeartbeat, 5)
    };
    let lies = [
        ("in the name of another", of_another),
        ("for another", for_another),
        ("in the name of who gets it", of_itself),
        ("of no term", liar.message(MessageType::MsgHeartbeat, 0)),
        ("entries of a later term", entries_of_later),
        ("an index of no end", of_no_end),
        ("to itself only", liar.message(MessageType::MsgHup, 5)),
        (
            "leads in a term that no election led to",
            liar.message(MessageType::MsgHeartbeat, u64::MAX),
        ),
        (
            "entries in such a term",
            liar.message(MessageType::MsgAppend, u64::MAX - 1),
        ),
        (
            "wants a vote for such a term",
            liar.message(MessageType::MsgRequestVote, 1 << 60),
        ),
    ];
    for (number, (what, lie)) in (0..).zip(lies) {
        let told = liar.told(liar.piece(vec![encode_message(&lie)])).await;
        assert_eq!(told.code(), Code::InvalidArgument, "{what}: {told:?}");
        liar.check(number).await;
    }
    let foreign = proto::Messages {
        cluster_id: 1,
        ..liar.piece(Vec::new())
    };
    let told = liar.told(foreign).await;
    assert_eq!(told.code(), Code::FailedPrecondition, "{told:?}");
    liar.check(100).await;
}

/// What comes in the place of a snapshot is refused, and leaves nothing behind.
#[tokio::test]
async fn snapshots_of_garbage_are_refused() {
    let mut liar = Liar::new().await;
    let offer = encode_message(&liar.message(MessageType::MsgSnapshot, 5));
    let mut random = Random::new(5);
    for number in 0..5 {
        let chunk: Vec<u8> = (0..random.below(5000))
            .map(|_| random.number().to_le_bytes()[0])
            .collect();
        let piece = proto::SnapshotPiece {
            cluster_id: liar.cluster_id,
            message: offer.clone(),
            chunk,
        };
        let sent = liar.client.install_snapshot(tokio_stream::once(piece));
        let told = sent.await.unwrap_err();
        assert_eq!(told.code(), Code::DataLoss, "{told:?}");
        liar.check(number).await;
    }
    // A member that is none of the cluster's learns nothing, and changes nothing.
    let stranger = proto::RebuildRequest {
        cluster_id: liar.cluster_id,
        member_id: 77,
        number: 1,
    };
    let told = liar.client.rebuild(stranger).await.unwrap_err();
    assert_eq!(told.code(), Code::NotFound, "{told:?}");
    liar.check(10).await;
}

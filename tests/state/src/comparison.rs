use std::fmt::Debug;

use keelson_etcd_api::etcdserverpb as pb;
use tonic::{Response, Status};

/// What two equal answers were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// An answer, with this revision in its header; 0 if it has none.
    Answered(i64),
    /// The same refusal.
    Refused,
}

/// Compares answers but for what differs between clusters: their ids and terms.
///
/// # Panics
/// If they differ.
pub fn compare<T: Debug + PartialEq>(
    context: &str,
    etcd: Result<Response<T>, Status>,
    keelson: Result<Response<T>, Status>,
    headers: impl Fn(&mut T) -> Vec<&mut Option<pb::ResponseHeader>>,
) -> Agreement {
    match (etcd, keelson) {
        (Ok(etcd), Ok(keelson)) => {
            let (mut etcd, mut keelson) = (etcd.into_inner(), keelson.into_inner());
            for answer in [&mut etcd, &mut keelson] {
                for header in headers(answer) {
                    let revision = header.as_ref().map_or(0, |header| header.revision);
                    *header = Some(pb::ResponseHeader {
                        revision,
                        ..pb::ResponseHeader::default()
                    });
                }
            }
            assert_eq!(etcd, keelson, "etcd left, keelson-state right; {context}");
            let first = headers(&mut etcd).into_iter().next().copied().flatten();
            Agreement::Answered(first.map_or(0, |header| header.revision))
        }
        (Err(etcd), Err(keelson)) => {
            assert_eq!(
                (etcd.code(), etcd.message()),
                (keelson.code(), keelson.message()),
                "etcd left, keelson-state right; {context}"
            );
            Agreement::Refused
        }
        (etcd, keelson) => panic!("etcd {etcd:?}, keelson-state {keelson:?}; {context}"),
    }
}

/// A number that an environment variable sets.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
    })
}

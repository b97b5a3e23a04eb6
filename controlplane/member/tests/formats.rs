//! Data folders as earlier versions wrote them: they open, or say why not.
//!
//! `fixtures/format-N.tar.xz` is the folder of a single member that was killed, without the files
//! that the log prepares: four puts, a lease, a flush, and one more put that is in the log only.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::Authority;
use keelson_member::disk::{Disk, Folder};
use keelson_member::{Identity, Limits, Member, MemberError, MemberOptions, Start};
use tempfile::TempDir;

fn unpacked(format: u32) -> (TempDir, Arc<dyn Disk>) {
    let folder = TempDir::new().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/fixtures/format-{format}.tar.xz"));
    let tar = Command::new("tar")
        .arg("-xJf")
        .arg(&fixture)
        .arg("-C")
        .arg(folder.path())
        .status()
        .unwrap();
    assert!(tar.success(), "tar cannot unpack {}", fixture.display());
    let disk = Folder::open(folder.path()).unwrap();
    (folder, Arc::new(disk))
}

fn open(disk: &Arc<dyn Disk>, cluster_id: u64, id: u64) -> Result<Member, MemberError> {
    let options = MemberOptions {
        cluster_id,
        id,
        start: Start::Continue,
        election_ticks: 10,
        seed: 1,
        cache_bytes: 1 << 20,
        limits: Limits::default(),
    };
    Member::open(disk, &options)
}

/// Never released, and without checksums: it is not read.
#[test]
fn the_first_is_told() {
    let (_folder, disk) = unpacked(1);
    let is_told = |error: &MemberError| {
        assert!(
            matches!(error, MemberError::Older { found: 1, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("before the first release"));
    };
    is_told(&Identity::load(&*disk).unwrap_err());
    is_told(&open(&disk, 1, 1).unwrap_err());
}

#[test]
fn the_second_opens() {
    let (_folder, disk) = unpacked(2);
    let identity = Identity::load(&*disk).unwrap().unwrap();
    let mut member = open(&disk, identity.cluster_id, identity.member_id).unwrap();
    member.advance(&mut |_| {}).unwrap();
    assert!(member.status().is_leader);
    let read = |key: &str| {
        let request = pb::RangeRequest {
            key: key.to_owned().into(),
            ..pb::RangeRequest::default()
        };
        let answer = member.keyspace().range(&Authority::default(), &request);
        String::from_utf8(answer.unwrap().kvs[0].value.to_vec()).unwrap()
    };
    assert_eq!(read("key0"), "zero");
    assert_eq!(read("key3"), "value 3");
    assert_eq!(read("after"), "the backup");
    assert_eq!(member.keyspace().leases().len(), 1);
    assert_eq!(member.keyspace().hash(0).unwrap().0, HASH);
}

/// Of the keys in the second fixture.
const HASH: u32 = 1_072_304_930;

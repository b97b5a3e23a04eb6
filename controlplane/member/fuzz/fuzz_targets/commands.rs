//! What the log may hold: any commands, applied one after the other. Each is answered or refused.
#![no_main]

use keelson_member::Limits;
use keelson_member::command::Command;
use keelson_member::disk::Folder;
use keelson_member::keyspace::{FORMAT, Keyspace, Metadata};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|commands: Vec<Vec<u8>>| {
    let commands: Vec<Command> = commands
        .iter()
        .filter_map(|bytes| Command::decode(&bytes[..]).ok())
        .collect();
    if commands.is_empty() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let disk = Folder::open(folder.path()).expect("it opens");
    let first = Metadata {
        format: FORMAT,
        revision: 1,
        compact_revision: -1,
        ..Metadata::default()
    };
    let keyspace = Keyspace::open(&disk, 1 << 20, Some(first), Limits::default()).expect("a new keyspace");
    for command in commands {
        let mut batch = keyspace.batch();
        batch.apply(command).expect("the member is not broken").ok();
        batch.finish();
    }
    if let Some(flush) = keyspace.begin_flush() {
        keyspace.flush(flush).expect("it is written");
    }
    while keyspace.clear_compacted().expect("it is cleared") {}
    let (hash, ..) = keyspace.hash(0).expect("everything is read");
    drop(keyspace);
    let keyspace = Keyspace::open(&disk, 1 << 20, None, Limits::default()).expect("it opens again");
    assert_eq!(keyspace.hash(0).expect("everything is read").0, hash);
});

//! Overlays in the file system: against a model, with snapshots, growth, damage, and changed bases.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "in tests"
)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keelson_blk::image::DirectMode;
use keelson_blk::overlay::files::{self, CreateOptions, Format, NewBase};
use keelson_blk::overlay::map::encode_block;
use keelson_blk::overlay::snapshot;
use keelson_blk::overlay::{Chain, FileStorage, Place, Segment, StripedFile};
use keelson_blk::sector_cipher::SectorCipher;
use proptest::prelude::*;
use tempfile::TempDir;

const STRIPE: u64 = 64 << 10;

struct Scene {
    folder: TempDir,
    cipher: Option<Arc<SectorCipher>>,
    direct: DirectMode,
}

impl Scene {
    fn new() -> Self {
        Self {
            folder: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            cipher: None,
            direct: DirectMode::Auto,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A base whose sectors are all different.
    fn base(&self, bytes: u64) -> (PathBuf, Vec<u8>) {
        let path = self.path("base.img");
        let mut content = Vec::new();
        for sector in 0..bytes.div_ceil(512) {
            content.extend_from_slice(&[sector.to_le_bytes(); 64].concat());
        }
        content.truncate(usize::try_from(bytes).unwrap());
        fs::write(&path, &content).unwrap();
        (path, content)
    }

    fn create(&self, name: &str, base: NewBase, bytes: Option<u64>) -> PathBuf {
        let path = self.path(name);
        files::create(&CreateOptions {
            path: path.clone(),
            base,
            bytes,
            stripe_bytes: None,
            cipher: self.cipher.clone(),
        })
        .unwrap();
        path
    }

    fn try_open(&self, path: &Path) -> Result<Arc<Chain>, keelson_blk::Error> {
        let options = files::OpenOptions {
            cipher: self.cipher.clone(),
            direct: self.direct,
            read_only: false,
        };
        files::open(path, &options, None).map(|open| open.chain)
    }

    fn open(&self, path: &Path) -> Arc<Chain> {
        self.try_open(path).unwrap()
    }

    fn refusal(&self, path: &Path) -> String {
        self.try_open(path).unwrap_err().to_string()
    }
}

fn raw(path: &Path) -> NewBase {
    NewBase::Image(path.into(), Format::Raw)
}

fn content(chain: &Chain) -> Vec<u8> {
    let mut all = vec![0xaa; usize::try_from(chain.bytes()).unwrap()];
    chain.read(&mut all, 0).unwrap();
    all
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    WriteZeroes(u64, u64),
    Flush,
    Reopen,
    Snapshot,
    Grow(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..700_u64, 1..300_u64);
    let step = prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((start, len), fill)| Step::Write(start, len, fill)),
        2 => range().prop_map(|(start, len)| Step::WriteZeroes(start, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Snapshot),
        1 => (1..200_u64).prop_map(Step::Grow),
    ];
    proptest::collection::vec(step, 1..25)
}

fn follow(scene: &Scene, steps: &[Step]) {
    let (base, mut model) = scene.base(3 * STRIPE + 700);
    let path = scene.create("disk.img", raw(&base), Some(5 * STRIPE + 512));
    model.resize(usize::try_from(5 * STRIPE + 512).unwrap(), 0);
    let mut snapshots: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let mut chain = scene.open(&path);
    for step in steps {
        let range = |start: u64, len: u64| {
            let sectors = model.len() as u64 / 512;
            let start = start.min(sectors - 1);
            let len = len.min(sectors - start);
            let (start, len) = (start * 512, len * 512);
            (
                start,
                usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap(),
            )
        };
        match step {
            Step::Write(start, len, fill) => {
                let (offset, range) = range(*start, *len);
                let bytes: Vec<u8> = range
                    .clone()
                    .map(|place| fill ^ (place / 512) as u8)
                    .collect();
                chain.write(&bytes, offset).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            Step::WriteZeroes(start, len) => {
                let (offset, range) = range(*start, *len);
                chain.write_zeroes(offset, range.len() as u64).unwrap();
                model[range].fill(0);
            }
            Step::Flush => chain.flush().unwrap(),
            Step::Reopen => {
                chain.flush().unwrap();
                drop(chain);
                chain = scene.open(&path);
            }
            Step::Snapshot => {
                chain.flush().unwrap();
                drop(chain);
                let name = format!("s{}", snapshots.len());
                let snapshot = snapshot::snapshot(&path, &name, scene.cipher.clone()).unwrap();
                snapshots.push((snapshot, model.clone()));
                chain = scene.open(&path);
            }
            Step::Grow(sectors) => {
                let bytes = model.len() as u64 + sectors * 512;
                chain.top().grow(bytes).unwrap();
                model.resize(usize::try_from(bytes).unwrap(), 0);
            }
        }
        assert!(content(&chain) == model, "after {step:?}");
    }
    chain.flush().unwrap();
    drop(chain);
    for (index, (snapshot, model)) in snapshots.iter().enumerate() {
        assert!(scene.refusal(snapshot).contains("snapshot"), "it is sealed");
        let clone = NewBase::Image(snapshot.clone(), Format::Overlay);
        let clone = scene.create(&format!("clone-{index}"), clone, None);
        assert!(content(&scene.open(&clone)) == *model, "snapshot {index}");
    }
    assert!(content(&scene.open(&path)) == model, "at the end");
}

#[test]
fn a_map_that_has_counted_to_the_end_is_an_error_and_no_panic() {
    let scene = Scene::new();
    let path = scene.create("disk", NewBase::None, Some(1 << 20));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let header = StripedFile::read_header(&FileStorage(file.try_clone().unwrap()), &path).unwrap();
    let last = encode_block(header.uuid, 0, u64::MAX, &[0; 508]);
    // Of two copies that differ, the newer one is written over the other.
    file.write_all_at(&last, header.map_offset(0)).unwrap();
    let refusal = scene.refusal(&path);
    assert!(refusal.contains("generation"), "{refusal}");
}

#[test]
fn a_stretch_ends_with_the_disk_however_long_a_one_is_asked_for() {
    let scene = Scene::new();
    let chain = scene.open(&scene.create("disk", NewBase::None, Some(3 * STRIPE + 512)));
    let zero = |len| Segment {
        place: Place::Zero,
        len,
    };
    assert_eq!(chain.locate(512, u64::MAX), zero(3 * STRIPE));
    assert_eq!(chain.locate(3 * STRIPE + 512, u64::MAX), zero(u64::MAX));
    assert_eq!(chain.locate(u64::MAX - 1, 1), zero(1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_overlay_is_the_disk_that_was_written(steps in steps(), direct in any::<bool>()) {
        let mut scene = Scene::new();
        scene.direct = if direct { DirectMode::Auto } else { DirectMode::Off };
        follow(&scene, &steps);
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn so_is_an_encrypted_one(steps in steps()) {
        let mut scene = Scene::new();
        let key: Vec<u8> = (0..64).collect();
        scene.cipher = Some(Arc::new(SectorCipher::new(&key).unwrap()));
        follow(&scene, &steps);
    }
}

#[test]
fn threads_that_bring_up_the_same_stripes_lose_nothing() {
    let scene = Scene::new();
    let (base, _) = scene.base(4 * STRIPE);
    let chain = scene.open(&scene.create("disk.img", raw(&base), None));
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let chain = &chain;
            scope.spawn(move || {
                for sector in (0..4 * STRIPE / 512).filter(|sector| sector % 4 == thread) {
                    chain.write(&[thread as u8 + 1; 512], sector * 512).unwrap();
                    if sector % 32 == thread {
                        chain.flush().unwrap();
                    }
                }
            });
        }
    });
    for (sector, bytes) in content(&chain).chunks_exact(512).enumerate() {
        assert!(
            bytes.iter().all(|byte| *byte == sector as u8 % 4 + 1),
            "sector {sector}"
        );
    }
}

#[test]
fn a_clone_of_a_large_base_takes_no_room() {
    let scene = Scene::new();
    let base = scene.path("base.img");
    File::create(&base).unwrap().set_len(1 << 40).unwrap();
    let path = scene.create("disk.img", raw(&base), None);
    let allocated = fs::metadata(&path).unwrap().blocks() * 512;
    assert!(allocated < 8 << 20, "{allocated} bytes");
    let chain = scene.open(&path);
    assert_eq!(chain.bytes(), 1 << 40);
    chain.write(&[1; 512], (1 << 40) - 512).unwrap();
    assert!(chain.is_in_top((1 << 40) - 512, 512));
}

#[test]
fn discards_give_room_back_and_never_show_the_base() {
    let scene = Scene::new();
    let (base, _) = scene.base(4 * STRIPE);
    let path = scene.create("disk.img", raw(&base), None);
    let chain = scene.open(&path);
    chain.write(&vec![7; 3 << 16], 0).unwrap();
    chain.flush().unwrap();
    let before = fs::metadata(&path).unwrap().blocks();
    chain.discard(0, 4 * STRIPE).unwrap();
    chain.flush().unwrap();
    let after = fs::metadata(&path).unwrap().blocks();
    assert!(after + 3 * 128 <= before, "{before} blocks, then {after}");
    assert_eq!(content(&chain), vec![0; 4 << 16]);
}

#[test]
fn stretches_are_found_where_they_are() {
    let scene = Scene::new();
    let (base, _) = scene.base(2 * STRIPE + 700);
    let path = scene.create("disk.img", raw(&base), Some(8 * STRIPE));
    let chain = scene.open(&path);
    chain.write(&[1; 512], STRIPE).unwrap();
    let at = |offset, len| chain.locate(offset, len);
    let found = |place, len| Segment { place, len };
    assert_eq!(at(0, 10 * STRIPE), found(Place::Raw, STRIPE));
    assert_eq!(at(512, 1024), found(Place::Raw, 1024));
    assert_eq!(at(STRIPE, 10 * STRIPE), found(Place::Layer(0), STRIPE));
    assert_eq!(at(2 * STRIPE, STRIPE), found(Place::Raw, 1024));
    assert_eq!(
        at(2 * STRIPE + 1024, STRIPE),
        found(Place::Zero, STRIPE - 1024)
    );
    assert_eq!(at(3 * STRIPE, 5 * STRIPE), found(Place::Zero, 5 * STRIPE));
}

#[test]
fn a_changed_base_is_refused() {
    let scene = Scene::new();
    let (base, content) = scene.base(4 * STRIPE);
    let path = scene.create("disk.img", raw(&base), None);
    drop(scene.open(&path));
    // Written to, but with the same content: refused, until somebody vouches for it.
    fs::write(&base, &content).unwrap();
    assert!(scene.refusal(&path).contains("image rebase"));
    files::rebase(&path, &base).unwrap();
    drop(scene.open(&path));
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    assert!(scene.refusal(&path).contains("its content is another"));
    assert!(files::rebase(&path, &base).is_err());
    file.set_len(5 * STRIPE).unwrap();
    assert!(scene.refusal(&path).contains("bytes"));
    fs::remove_file(&base).unwrap();
    assert!(scene.refusal(&path).contains("base.img"));
}

#[test]
fn a_layer_below_that_was_opened_for_writing_is_refused() {
    let scene = Scene::new();
    let lower = scene.create("lower.img", NewBase::None, Some(4 * STRIPE));
    let base = NewBase::Image(lower.clone(), Format::Overlay);
    let upper = scene.create("upper.img", base, None);
    drop(scene.open(&upper));
    drop(scene.open(&lower));
    assert!(scene.refusal(&upper).contains("opened for writing"));
}

#[test]
fn two_writers_are_refused_and_clones_share_a_base() {
    let scene = Scene::new();
    let (base, _) = scene.base(4 * STRIPE);
    let one = scene.create("one.img", raw(&base), None);
    let other = scene.create("other.img", raw(&base), None);
    let _one = scene.open(&one);
    let _other = scene.open(&other);
    assert!(scene.refusal(&one).contains("in use"));
}

#[test]
fn one_damaged_copy_is_repaired_and_two_are_named() {
    let scene = Scene::new();
    let path = scene.create("disk.img", NewBase::None, Some(4 * STRIPE));
    let chain = scene.open(&path);
    chain.write(&[5; 512], 0).unwrap();
    chain.flush().unwrap();
    let header = chain.top().header();
    drop(chain);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for copy in 0..2 {
        file.write_all_at(b"damage", u64::from(copy) * 4096 + 60)
            .unwrap();
        file.write_all_at(b"damage", header.map_offset(copy) + 99)
            .unwrap();
        let chain = scene.open(&path);
        assert_eq!(content(&chain)[..512], [5; 512]);
    }
    for copy in 0..2 {
        file.write_all_at(b"damage", header.map_offset(copy) + 99)
            .unwrap();
    }
    assert!(scene.refusal(&path).contains("both copies of block 0"));
    for copy in 0..2 {
        file.write_all_at(b"damage", copy * 4096 + 60).unwrap();
    }
    assert!(scene.refusal(&path).contains("both copies of its header"));
}

#[test]
fn an_interrupted_snapshot_is_finished_by_asking_again() {
    let scene = Scene::new();
    let path = scene.create("disk.img", NewBase::None, Some(4 * STRIPE));
    scene.open(&path).write(&[5; 512], 0).unwrap();
    // As it is after a kill between the link and the rename.
    fs::hard_link(&path, scene.path("disk.img.s")).unwrap();
    fs::write(scene.path("disk.img.~new"), b"half").unwrap();
    snapshot::snapshot(&path, "s", None).unwrap();
    let again = snapshot::snapshot(&path, "s", None)
        .unwrap_err()
        .to_string();
    assert!(again.contains("already"), "{again}");
    assert_eq!(scene.open(&path).layers().len(), 2);
}

#[test]
fn a_wrong_or_missing_key_is_refused() {
    let mut scene = Scene::new();
    let key: Vec<u8> = (0..64).collect();
    scene.cipher = Some(Arc::new(SectorCipher::new(&key).unwrap()));
    let path = scene.create("disk.img", NewBase::None, Some(4 * STRIPE));
    scene.open(&path).write(&[5; 512], 0).unwrap();
    scene.cipher = Some(Arc::new(SectorCipher::new(&key[..32]).unwrap()));
    assert!(scene.refusal(&path).contains("not the one"));
    scene.cipher = None;
    assert!(scene.refusal(&path).contains("--key-fd"));
    let bytes = fs::read(&path).unwrap();
    assert!(
        !bytes.windows(64).any(|window| window == [5; 64]),
        "it is encrypted"
    );
}

#[test]
fn a_raw_base_that_looks_like_an_overlay_is_not_believed() {
    let scene = Scene::new();
    let lower = scene.create("lower.img", NewBase::None, Some(4 * STRIPE));
    let created = files::create(&CreateOptions {
        path: scene.path("disk.img"),
        base: raw(&lower),
        bytes: None,
        stripe_bytes: None,
        cipher: None,
    });
    let reason = created.unwrap_err().to_string();
    assert!(reason.contains("--base-format overlay"), "{reason}");
}

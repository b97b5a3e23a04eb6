//! Importing qcow2: what qemu-img makes is read as qemu-img reads it, and nothing that a file says
//! leads to a panic, an endless loop or much memory.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "in tests"
)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_blk::qcow2::{Qcow2Error, Qcow2Image, import};
use proptest::prelude::*;
use tempfile::TempDir;

fn folder() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {stderr}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw disk with data, zeroes and holes, of a size that is no multiple of a cluster.
fn raw_disk(folder: &Path) -> PathBuf {
    let path = folder.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len((9 << 20) + 512).unwrap();
    for (place, fill) in [(0, 1_u8), (1 << 20, 2), (5 << 20, 3), (9 << 20, 4)] {
        let text: Vec<u8> = (0..512_u32)
            .map(|byte| fill.wrapping_mul(byte as u8))
            .collect();
        file.write_all_at(&text, place).unwrap();
    }
    // A stretch that doesn't compress.
    let mut state = 7_u64;
    let noise = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    });
    let noise: Vec<u8> = noise.take(300_000).collect();
    file.write_all_at(&noise, 3 << 20).unwrap();
    path
}

fn imported(qcow2: &Path) -> Result<Vec<u8>, Qcow2Error> {
    let target = qcow2.with_extension("imported");
    let mut last = (0, 0);
    import(File::open(qcow2).unwrap(), &target, |done, size| {
        last = (done, size);
    })?;
    assert_eq!(last.0, last.1, "progress reaches the end");
    let bytes = fs::read(&target).unwrap();
    fs::remove_file(target).unwrap();
    Ok(bytes)
}

fn refusal(qcow2: &Path) -> String {
    imported(qcow2).unwrap_err().to_string()
}

#[test]
fn every_kind_that_qemu_img_makes_is_read_as_it_reads_it() {
    let folder = folder();
    let raw = raw_disk(folder.path());
    let expected = fs::read(&raw).unwrap();
    let kinds = [
        ("compat=0.10", false),
        ("compat=1.1", false),
        ("compat=1.1", true),
        ("compat=1.1,compression_type=zstd", true),
        ("cluster_size=512", false),
        ("cluster_size=512", true),
        ("cluster_size=2M", true),
        ("lazy_refcounts=on,refcount_bits=1", false),
        ("preallocation=full", false),
    ];
    for (options, compressed) in kinds {
        let qcow2 = folder.path().join("disk.qcow2");
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if compressed {
            arguments.push("-c");
        }
        arguments.extend([text(&raw), text(&qcow2)]);
        qemu_img(&arguments);
        assert!(
            imported(&qcow2).unwrap() == expected,
            "{options}, {compressed}"
        );
    }
}

#[test]
fn an_empty_disk_takes_no_room() {
    let folder = folder();
    let qcow2 = folder.path().join("disk.qcow2");
    qemu_img(&["create", "-f", "qcow2", text(&qcow2), "3G"]);
    let target = folder.path().join("disk.raw");
    import(File::open(&qcow2).unwrap(), &target, |_, _| {}).unwrap();
    let metadata = fs::metadata(&target).unwrap();
    assert_eq!(metadata.len(), 3 << 30);
    assert!(metadata.blocks() < 100);
}

#[test]
fn backing_files_and_what_is_not_supported_are_named() {
    let folder = folder();
    let raw = raw_disk(folder.path());
    let qcow2 = folder.path().join("disk.qcow2");
    qemu_img(&[
        "create",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        text(&raw),
        text(&qcow2),
    ]);
    assert!(refusal(&qcow2).contains("disk.raw"));
    qemu_img(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on",
        text(&qcow2),
        "1G",
    ]);
    assert!(refusal(&qcow2).contains("subclusters"));
    let data = folder.path().join("data");
    let option = format!("data_file={}", text(&data));
    qemu_img(&["create", "-f", "qcow2", "-o", &option, text(&qcow2), "1G"]);
    assert!(refusal(&qcow2).contains("another file"));
    assert!(refusal(&raw).contains("no qcow2"));
}

#[test]
fn an_existing_target_is_left_alone_and_a_failed_one_removed() {
    let folder = folder();
    let raw = raw_disk(folder.path());
    let qcow2 = folder.path().join("disk.qcow2");
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&qcow2),
    ]);
    let before = fs::read(&raw).unwrap();
    assert!(import(File::open(&qcow2).unwrap(), &raw, |_, _| {}).is_err());
    assert!(fs::read(&raw).unwrap() == before);
    // Cut off in the middle of its data.
    let file = fs::OpenOptions::new().write(true).open(&qcow2).unwrap();
    file.set_len(fs::metadata(&qcow2).unwrap().len() / 2)
        .unwrap();
    let target = folder.path().join("new.raw");
    assert!(import(File::open(&qcow2).unwrap(), &target, |_, _| {}).is_err());
    assert!(!target.exists());
}

/// A small image with one table of each level.
fn small() -> Vec<u8> {
    let mut bytes = vec![0; 4 * 512];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    bytes[7] = 3;
    bytes[23] = 9;
    bytes[24..32].copy_from_slice(&(64_u64 * 512).to_be_bytes());
    bytes[36..40].copy_from_slice(&1_u32.to_be_bytes());
    bytes[40..48].copy_from_slice(&512_u64.to_be_bytes());
    bytes[100..104].copy_from_slice(&112_u32.to_be_bytes());
    bytes[512..520].copy_from_slice(&1024_u64.to_be_bytes());
    bytes[1024..1032].copy_from_slice(&1536_u64.to_be_bytes());
    bytes[1536..].fill(9);
    bytes
}

fn read_all(bytes: &[u8]) -> Result<u64, Qcow2Error> {
    let mut image = Qcow2Image::open(bytes)?;
    let clusters = image.header().clusters().min(2000);
    let mut buffer = vec![0; image.header().cluster_bytes() as usize];
    for index in 0..clusters {
        image.read_cluster(index, &mut buffer)?;
    }
    Ok(clusters)
}

#[test]
fn the_small_image_is_whole() {
    assert_eq!(read_all(&small()).unwrap(), 64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_images_are_read_or_refused(
        changes in proptest::collection::vec((0..1100_usize, any::<u8>()), 1..12),
        cut in 0..2048_usize,
    ) {
        let mut bytes = small();
        for (place, byte) in changes {
            bytes[place] = byte;
        }
        let _ = read_all(&bytes);
        bytes.truncate(cut);
        let _ = read_all(&bytes);
    }

    #[test]
    fn any_tables_are_read_or_refused(
        tables in proptest::collection::vec(any::<u64>(), 128), features in 0..16_u64, bits in 9..22_u8,
    ) {
        let mut bytes = small();
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes[23] = bits;
        bytes[40..48].copy_from_slice(&[0; 8]);
        for (place, entry) in bytes[512..1536].chunks_exact_mut(8).zip(&tables) {
            place.copy_from_slice(&entry.to_be_bytes());
        }
        let _ = read_all(&bytes);
    }
}

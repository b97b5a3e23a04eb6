//! Images are what their publisher's SHA256SUMS or SHA512SUMS says, or they are refused.

#![allow(clippy::unwrap_used, reason = "in tests")]

mod harness;
#[allow(dead_code, reason = "these tests use a part of it")]
#[path = "harness/http_server.rs"]
mod http_server;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::PATIENCE;
use http_server::HttpServer;
use tempfile::TempDir;

struct Scene {
    folder: TempDir,
    image: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = folder.path().join("debian.raw");
        let content: Vec<u8> = (0..(3 << 20) + 1536_u32)
            .map(|byte| (byte % 251).to_le_bytes()[0])
            .collect();
        fs::write(&image, content).unwrap();
        Self { folder, image }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// What coreutils say: the tool is `sha256sum` or `sha512sum`.
fn sum(tool: &str, file: &Path) -> String {
    let output = Command::new(tool).arg(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

/// Another digest of the same form.
fn other(digest: &str) -> String {
    let last = if digest.ends_with('0') { "1" } else { "0" };
    format!("{}{last}", &digest[..digest.len() - 1])
}

fn image(arguments: &[&str], paths: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    command.arg("image").args(arguments).args(paths);
    command.output().unwrap()
}

#[track_caller]
fn assert_done(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

#[track_caller]
fn assert_refused(output: &Output, code: i32, words: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
}

#[test]
fn a_manifest_is_made_of_the_image_that_was_meant_alone() {
    let scene = Scene::new();
    let manifest = scene.path("debian.raw.manifest");
    for (option, tool, name) in [
        ("--sha256", "sha256sum", "SHA-256"),
        ("--sha512", "sha512sum", "SHA-512"),
    ] {
        let digest = sum(tool, &scene.image);
        let refused = image(&["manifest", option, &other(&digest)], &[&scene.image]);
        assert_refused(&refused, 3, &["debian.raw", name, &digest, &other(&digest)]);
        assert!(!manifest.exists());
        // Some tools print capitals.
        let capitals = digest.to_uppercase();
        assert_done(&image(&["manifest", option, &capitals], &[&scene.image]));
        fs::remove_file(&manifest).unwrap();
        let short = image(&["manifest", option, &digest[1..]], &[&scene.image]);
        assert_refused(&short, 2, &["hexadecimal digits"]);
    }
    let (sha256, sha512) = (
        sum("sha256sum", &scene.image),
        sum("sha512sum", &scene.image),
    );
    let both = ["manifest", "--sha256", &sha256, "--sha512", &other(&sha512)];
    assert_refused(&image(&both, &[&scene.image]), 3, &["SHA-512"]);
}

#[test]
fn an_import_takes_the_download_that_was_meant_alone() {
    let scene = Scene::new();
    let (qcow2, target) = (scene.path("debian.qcow2"), scene.path("imported.raw"));
    let converted = Command::new("qemu-img")
        .args(["convert", "-O", "qcow2"])
        .args([&scene.image, &qcow2])
        .status();
    assert!(converted.unwrap().success());
    let digest = sum("sha512sum", &qcow2);
    let wrong = other(&digest);
    let refused = image(&["import", "--sha512", &wrong], &[&qcow2, &target]);
    assert_refused(&refused, 3, &["debian.qcow2", "SHA-512", &digest]);
    assert!(!target.exists());
    assert_done(&image(&["import", "--sha512", &digest], &[&qcow2, &target]));
    assert!(fs::read(&target).unwrap() == fs::read(&scene.image).unwrap());
}

#[test]
fn what_was_fetched_whole_is_compared_with_what_was_meant() {
    let scene = Scene::new();
    let server = HttpServer::start(fs::read(&scene.image).unwrap(), None);
    let (digest, overlay) = (sum("sha256sum", &scene.image), scene.path("web.img"));
    let create = ["create", "--no-checksums", "--overlay-of", &server.url()];
    assert_done(&image(&create, &[&overlay]));
    let refused = image(&["fetch", "--sha256", &other(&digest)], &[&overlay]);
    assert_refused(&refused, 3, &["web.img", "SHA-256", &digest]);
    assert_done(&image(&["fetch", "--sha256", &digest], &[&overlay]));
    // What is in the file is compared, not what the server has: here a piece of it is damaged.
    let file = fs::File::options().read(true).write(true).open(&overlay);
    let file = file.unwrap();
    let mut capacity = [0; 8];
    file.read_exact_at(&mut capacity, 80).unwrap();
    let maps = 8192 + u64::from_le_bytes(capacity) * 4096 * 2;
    let data = maps.next_multiple_of(1 << 20);
    file.write_all_at(&[0xff; 8], data + (2 << 20)).unwrap();
    let refused = image(&["fetch", "--sha256", &digest], &[&overlay]);
    assert_refused(&refused, 3, &["web.img", "SHA-256", &digest]);
}

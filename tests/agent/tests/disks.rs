//! Disks that are overlays, encrypted, limited, and grow, as the agent keeps them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use keelson_agent_tests::{Guest, Host};
use keelson_vmm_tests::binary;
use tokio::runtime::Runtime;

const MIB: usize = 1 << 20;

fn disk(spec: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Disk\nmetadata: {{name: data}}\nspec: {{{spec}}}\n"
    )
}

fn guest(steps: &str) -> String {
    Guest::new("web", steps)
        .field("disks: [{name: data, disk: data}]")
        .manifest()
}

#[test]
fn an_overlay_is_created_when_it_is_first_used_and_leaves_its_base_alone() {
    let host = Host::new();
    let (base, overlay) = (host.path("base.img"), host.path("overlay.img"));
    let content = vec![7; 4 * MIB];
    fs::write(&base, &content).expect("an image can be written");
    let spec = |more: &str| {
        let (base, overlay) = (base.display(), overlay.display());
        disk(&format!("path: {overlay}, base: {{path: {base}}}{more}"))
    };
    let steps = "blk-write:sectors=256,seed=1 blk-verify:sectors=256,seed=1 hang";
    host.apply(&format!("{}{}", spec(", size: 8Mi"), guest(steps)))
        .done();
    host.wait_for_console("web", "payload: blk-verify ok");
    assert!(overlay.exists());
    assert!(fs::read(&base).expect("it is there") == content);
    // Limits and sizes change while it runs; nothing has to be restarted.
    host.apply(&spec(
        ", size: 16Mi, limits: {operationsPerSecond: 1000, bytesPerSecond: 50Mi}",
    ))
    .done();
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let disk = host.served_disk("web", "data");
        let operations = &disk["limits"]["operations"]["per_second"];
        if *operations == 1000 && disk["capacity_bytes"] == 16 << 20 {
            break;
        }
        assert!(Instant::now() < deadline, "{disk}");
        thread::sleep(Duration::from_millis(50));
    }
    let guest = host.object("vm", "web");
    assert_eq!(guest["status"]["phase"], "Running");
    // What it is made of does not change.
    let other = host.path("other.img");
    fs::write(&other, &content).expect("an image can be written");
    let path = overlay.display();
    host.apply(&disk(&format!(
        "path: {path}, base: {{path: {}}}",
        other.display()
    )))
    .refused(5, &["Disk/data", "spec.base", "can't be changed"]);
    host.apply(&disk(&format!("path: {path}")))
        .refused(5, &["spec.base", "can't be changed"]);
    host.apply(&spec(", size: 8Mi"))
        .refused(5, &["spec.size", "only grow"]);
}

// The image at `/debian.raw` in parts, and its manifest beside it, for as long as the runtime lives.
fn publish(image: Vec<u8>, manifest: Vec<u8>) -> (Runtime, String) {
    let runtime = Runtime::new().expect("a runtime");
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
    let listener = listener.expect("a free port");
    let url = format!(
        "http://{}/debian.raw",
        listener.local_addr().expect("bound")
    );
    let app = Router::new()
        .route("/debian.raw.manifest", get(move || async move { manifest }))
        .route(
            "/debian.raw",
            get(async move |headers: HeaderMap| {
                let range = headers[header::RANGE].to_str().expect("a range");
                let range = range.trim_start_matches("bytes=").split_once('-');
                let (first, last) = range.expect("a range");
                let first: usize = first.parse().expect("a number");
                let last = last
                    .parse::<usize>()
                    .expect("a number")
                    .min(image.len() - 1);
                let what = format!("bytes {first}-{last}/{}", image.len());
                let part = image[first..=last].to_vec();
                (
                    StatusCode::PARTIAL_CONTENT,
                    [(header::CONTENT_RANGE, what)],
                    part,
                )
            }),
        );
    drop(runtime.spawn(async { axum::serve(listener, app).await }));
    (runtime, url)
}

#[test]
fn a_disk_may_stand_on_an_image_on_a_server() {
    let host = Host::new();
    let (image, overlay) = (host.path("published.raw"), host.path("overlay.img"));
    let content = vec![7; 4 * MIB];
    fs::write(&image, &content).expect("an image can be written");
    let made = Command::new(binary("keelson-blk"))
        .args(["image", "manifest"])
        .arg(&image)
        .status();
    assert!(made.expect("keelson-blk runs").success());
    let manifest = fs::read(host.path("published.raw.manifest")).expect("it is there");
    let (_server, url) = publish(content, manifest);
    let path = overlay.display();
    host.apply(&disk(&format!(
        "path: {path}, base: {{url: {url:?}, path: /somewhere}}"
    )))
    .refused(4, &["Disk/data", "spec.base", "either a path or a url"]);
    let spec = disk(&format!(
        "path: {path}, base: {{url: {url:?}, fillBytesPerSecond: 64Mi}}"
    ));
    let steps = "blk-write:sectors=256,seed=1 blk-verify:sectors=256,seed=1 hang";
    host.apply(&format!("{spec}{}", guest(steps))).done();
    host.wait_for_console("web", "payload: blk-verify ok");
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let source = host.served_disk("web", "data")["source"].clone();
        assert_eq!(source["url"], url);
        assert_eq!(source["failed_attempts"], 0);
        // All but what the guest has written.
        if source["fetched_bytes"].as_u64() >= Some(3 << 20) {
            break;
        }
        assert!(Instant::now() < deadline, "{source}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_key_file_is_checked_and_its_disk_encrypted() {
    let host = Host::new();
    let (image, key) = (host.path("data.img"), host.path("key"));
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let (path, key_path) = (image.display(), key.display());
    let spec = disk(&format!(
        "path: {path}, encryption: {{keyFile: {key_path}}}"
    ));
    host.apply(&spec)
        .refused(5, &["spec.encryption.keyFile", "No such file"]);
    fs::write(&key, [1; 40]).expect("a file can be written");
    host.apply(&spec)
        .refused(5, &["spec.encryption.keyFile", "40 bytes"]);
    let bytes: Vec<u8> = (0..64).collect();
    fs::write(&key, bytes).expect("a file can be written");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("a mode can be set");
    host.apply(&spec)
        .refused(5, &["spec.encryption.keyFile", "mode 600"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    let steps = "blk-write:sectors=256,seed=1 blk-verify:sectors=256,seed=1 hang";
    host.apply(&format!("{spec}{}", guest(steps))).done();
    host.wait_for_console("web", "payload: blk-verify ok");
    let stored = fs::read(&image).expect("it is there");
    let plain = keelson_vmm_tests::pattern_sector(0, 1);
    assert_ne!(stored[..512], plain[..], "it is encrypted");
    assert_ne!(stored[..512], [0; 512], "it is written");
}

#[test]
fn an_overlay_on_a_base_that_changed_does_not_start() {
    let host = Host::new();
    let (base, overlay) = (host.path("base.img"), host.path("overlay.img"));
    fs::write(&base, vec![7; MIB]).expect("an image can be written");
    let spec = disk(&format!(
        "path: {}, base: {{path: {}}}",
        overlay.display(),
        base.display()
    ));
    host.apply(&format!("{spec}{}", guest("hang"))).done();
    host.wait_for_console("web", "payload: hang ok");
    host.keelson(&["stop", "web", "--force"]).done();
    fs::write(&base, vec![8; MIB]).expect("an image can be written");
    host.keelson(&["start", "web"]);
    let message = host.wait_for_reason("web", "DiskUnusable");
    assert!(message.contains("has changed"), "{message}");
}

#[test]
fn an_overlay_whose_backend_was_replaced_is_adopted_with_its_guest() {
    let mut host = Host::new();
    let (base, overlay) = (host.path("base.img"), host.path("overlay.img"));
    fs::write(&base, vec![7; 4 * MIB]).expect("an image can be written");
    let spec = disk(&format!(
        "path: {}, base: {{path: {}}}, size: 8Mi",
        overlay.display(),
        base.display()
    ));
    host.apply(&format!("{spec}{}", guest("blk-write:sectors=256 hang")))
        .done();
    host.wait_for_console("web", "payload: hang ok");
    let backends = host.processes("keelson-blk");
    let id = backends.first().expect("one is there").cast_signed();
    let id = rustix::process::Pid::from_raw(id).expect("not zero");
    rustix::process::kill_process(id, rustix::process::Signal::KILL).expect("it is there");
    let deadline = Instant::now() + Duration::from_mins(1);
    while host
        .processes("keelson-blk")
        .first()
        .is_none_or(|now| backends.contains(now))
    {
        assert!(Instant::now() < deadline, "no other backend");
        thread::sleep(Duration::from_millis(50));
    }
    host.kill_agent();
    host.start_agent();
    let deadline = Instant::now() + Duration::from_mins(1);
    while !host.keelson(&["events", "web"]).done().contains("Adopted") {
        assert!(Instant::now() < deadline, "{}", host.agent_log());
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Running");
}

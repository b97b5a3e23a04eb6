//! Disks that are overlays, encrypted, limited, and grow, as the agent keeps them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use keelson_agent_tests::{Guest, Host, metrics};
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

/// Kills the only keelson-blk of the host; its process id.
fn kill_backend(host: &Host) -> u32 {
    let backends = host.processes("keelson-blk");
    let [backend] = backends[..] else {
        panic!("one backend runs, not {backends:?}");
    };
    let id = rustix::process::Pid::from_raw(backend.cast_signed()).expect("not zero");
    rustix::process::kill_process(id, rustix::process::Signal::KILL).expect("it is there");
    backend
}

/// Waits until another keelson-blk than the killed one serves the guest's disk.
fn wait_for_backend(host: &Host, killed: u32) {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        let other = host.processes("keelson-blk").iter().any(|id| *id != killed);
        let shown = host
            .keelson(&["disk", "stats", "data", "-o", "json"])
            .done();
        if other && shown.contains("counters") {
            return;
        }
        assert!(Instant::now() < deadline, "no other backend: {shown}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_snapshot_keeps_what_a_running_guests_disk_held() {
    let host = Host::new();
    let (base, overlay) = (host.path("base.img"), host.path("overlay.img"));
    fs::write(&base, vec![7; 4 * MIB]).expect("an image can be written");
    let spec = disk(&format!(
        "path: {}, base: {{path: {}}}",
        overlay.display(),
        base.display()
    ));
    let steps = "blk-write:sectors=256,seed=1 console-read:ms=120000 blk-write:sectors=512,seed=2 \
                 blk-verify:sectors=512,seed=2 hang";
    host.apply(&format!("{spec}{}", guest(steps))).done();
    host.wait_for_console("web", "payload: blk-write ok");
    for (arguments, code, word) in [
        (["nothing", "monday"], 3, "not found"),
        (["data", "a/b"], 4, "no slash"),
    ] {
        let arguments = [&["disk", "snapshot"][..], &arguments].concat();
        host.keelson(&arguments).refused(code, &[word]);
    }
    let said = host.keelson(&["disk", "snapshot", "data", "monday"]).done();
    let monday = host.path("overlay.img.monday");
    assert!(said.contains(&monday.display().to_string()), "{said}");
    host.keelson(&["disk", "snapshot", "data", "monday"])
        .refused(5, &["already"]);
    assert_eq!(host.served_disk("web", "data")["layers"], 2);
    // The guest writes on, also after its backend was replaced.
    let killed = kill_backend(&host);
    wait_for_backend(&host, killed);
    let mut console =
        UnixStream::connect(host.path("run/vms/web/console.sock")).expect("there is a console");
    console.write_all(b"go\n").expect("it is read");
    host.wait_for_console("web", "payload: blk-verify ok");
    let events = host.keelson(&["describe", "disk", "data"]).done();
    assert!(events.contains("SnapshotTaken"), "{events}");
    // Once more, of the disk that nobody uses.
    host.keelson(&["stop", "web", "--force"]).done();
    host.wait_for_phase("web", "Stopped");
    host.keelson(&["disk", "snapshot", "data", "tuesday"])
        .done();
    for (snapshot, seed, sectors) in [("monday", 1, 256), ("tuesday", 2, 512)] {
        let exported = host.path(snapshot);
        let status = Command::new(binary("keelson-blk"))
            .args(["image", "export"])
            .arg(host.path(&format!("overlay.img.{snapshot}")))
            .arg(&exported)
            .status();
        assert!(status.expect("keelson-blk runs").success());
        let held = fs::read(exported).expect("it is there");
        for (number, sector) in (0..).zip(held.chunks(512)).take(sectors) {
            let expected = keelson_vmm_tests::pattern_sector(number, seed);
            assert!(sector == &expected[..], "{snapshot}, sector {number}");
        }
        assert!(
            held[sectors * 512..].iter().all(|byte| *byte == 7),
            "{snapshot}"
        );
    }
}

#[test]
fn raw_and_read_only_disks_have_no_snapshots() {
    let host = Host::new();
    let (raw, overlay) = (host.path("raw.img"), host.path("overlay.img"));
    fs::write(&raw, vec![7; MIB]).expect("an image can be written");
    host.apply(&disk(&format!("path: {}", raw.display())))
        .done();
    host.keelson(&["disk", "snapshot", "data", "monday"])
        .refused(5, &["Disk/data", "only overlays"]);
    let created = Command::new(binary("keelson-blk"))
        .args(["image", "create", "--overlay-of"])
        .args([&raw, &overlay])
        .status();
    assert!(created.expect("keelson-blk runs").success());
    host.apply(&disk(&format!(
        "path: {}, format: overlay, readOnly: true",
        overlay.display()
    )))
    .done();
    host.keelson(&["disk", "snapshot", "data", "monday"])
        .refused(5, &["Disk/data", "read-only"]);
}

#[test]
fn what_guests_do_with_disks_is_shown_and_on_the_page_for_prometheus() {
    let mut host = Host::without_agent();
    host.configure("metrics_listen = \"127.0.0.1:9469\"\n");
    host.start_agent();
    let image = host.path("data.img");
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let none = host.keelson(&["disk", "stats"]);
    assert!(none.errors.contains("no disk"), "{none:?}");
    let spec = disk(&format!("path: {}", image.display()));
    let steps = "blk-write:sectors=256 blk-verify:sectors=256 hang";
    host.apply(&format!("{spec}{}", guest(steps))).done();
    host.wait_for_console("web", "payload: hang ok");
    let shown = host.keelson(&["disk", "stats", "data"]).done();
    for operation in ["read", "write", "flush"] {
        let row = shown.lines().find(|row| row.contains(operation));
        let fields: Vec<&str> = row.expect("it is shown").split_whitespace().collect();
        assert_eq!(fields[..3], ["data", "web", operation], "{shown}");
        assert_ne!(fields[3], "0", "{shown}");
    }
    host.keelson(&["disk", "stats", "nothing"])
        .refused(3, &["Disk/nothing"]);
    let json = host.keelson(&["disk", "stats", "-o", "json"]).done();
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let served = &json[0]["served"];
    assert_eq!(
        served["counters"][0]["bytes_written"],
        256 * 512,
        "{served}"
    );
    assert!(
        served["latencies"]["write"]["p99_seconds"].is_number(),
        "{served}"
    );
    let page = metrics("127.0.0.1:9469");
    for line in [
        "keelson_blk_up{guest=\"web\",disk=\"data\"} 1",
        "keelson_blk_written_bytes_total{guest=\"web\",disk=\"data\",queue=\"0\"} 131072",
        "# TYPE keelson_blk_request_duration_seconds histogram",
        "keelson_blk_request_duration_seconds_count{guest=\"web\",disk=\"data\",operation=\"flush\"}",
    ] {
        assert!(page.contains(line), "{line:?} is served:\n{page}");
    }
}

#[test]
fn no_disk_takes_the_place_of_one_that_is_gone_and_changes_come_with_its_return() {
    let host = Host::new();
    let (base, overlay) = (host.path("base.img"), host.path("overlay.img"));
    fs::write(&base, vec![7; 4 * MIB]).expect("an image can be written");
    let spec = |more: &str| {
        let (base, overlay) = (base.display(), overlay.display());
        disk(&format!("path: {overlay}, base: {{path: {base}}}{more}"))
    };
    let steps = "blk-write:sectors=256,seed=1 hang";
    host.apply(&format!("{}{}", spec(""), guest(steps))).done();
    host.wait_for_console("web", "payload: hang ok");
    let elsewhere = host.path("elsewhere.img");
    fs::rename(&overlay, &elsewhere).expect("a file can be moved");
    kill_backend(&host);
    let message = host.wait_for_reason("web", "DiskUnusable");
    assert!(message.contains("overlay.img"), "{message}");
    assert!(!overlay.exists(), "another disk was made for the guest");
    // It can't be told to a backend that isn't there.
    fs::rename(&elsewhere, &overlay).expect("a file can be moved");
    host.apply(&spec(", limits: {operationsPerSecond: 1000}"))
        .done();
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        let shown = host
            .keelson(&["disk", "stats", "data", "-o", "json"])
            .done();
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        if shown[0]["served"]["limits"]["operations"]["per_second"] == 1000 {
            break;
        }
        assert!(Instant::now() < deadline, "{}", host.agent_log());
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Running");
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
    let killed = kill_backend(&host);
    wait_for_backend(&host, killed);
    host.kill_agent();
    host.start_agent();
    let deadline = Instant::now() + Duration::from_mins(1);
    while !host.keelson(&["events", "web"]).done().contains("Adopted") {
        assert!(Instant::now() < deadline, "{}", host.agent_log());
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Running");
}

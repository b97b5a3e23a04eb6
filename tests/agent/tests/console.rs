//! `keelson console` on a terminal, with a guest that has a virtio console.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};

use keelson_agent_tests::{Guest, Host};
use keelson_vmm_tests::{binary, wait_until};

#[test]
fn a_virtio_console_has_the_size_of_the_terminal_that_shows_it() {
    let host = Host::new();
    let guest = Guest::new("web", "hvc-echo").field("devices: {console: {}}");
    host.apply(&guest.manifest()).done();
    host.wait_for_console("web", "payload: hvc-echo ready columns=80 rows=24");
    let (typescript, resize) = (host.path("typescript"), host.path("resize"));
    // util-linux' script gives it a terminal, whose size is changed when the file is there.
    let shown = format!(
        "stty rows 40 cols 100; \
         (until [ -e {} ]; do sleep 0.05; done; stty rows 50 cols 120 </dev/tty) & \
         exec {} console web",
        resize.display(),
        binary("keelson").display()
    );
    let mut terminal = Command::new("script")
        .args(["--quiet", "--flush", "--command", &shown])
        .arg(&typescript)
        .env("KEELSON_SOCKET", host.path("run/keelsond.sock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs `script` of util-linux");
    host.wait_for_console("web", "payload: hvc-echo size columns=100 rows=40");
    File::create(&resize).expect("a file is made");
    host.wait_for_console("web", "payload: hvc-echo size columns=120 rows=50");
    let mut input = terminal.stdin.take().expect("it was piped");
    input.write_all(b"end\n").expect("it takes input");
    let ended = wait_until("its end", || {
        terminal.try_wait().expect("it can be asked for")
    });
    assert!(ended.success(), "{ended}");
    let shown = fs::read(&typescript).unwrap_or_default();
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("hvc: typed end"), "{shown}");
}

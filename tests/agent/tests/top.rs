//! `keelson top` on a terminal, with guests that do something: what it shows, and its picture.
//!
//! `KEELSON_PICTURE=docs/keelson-top.svg ./test -E 'test(the_screen)'` draws the picture of the README.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use keelson_agent_tests::{Guest, Host, disk, network};
use keelson_vmm_tests::{binary, wait_until};

const ROWS: u16 = 10;
const COLUMNS: u16 = 104;
/// Of a character, in the picture's units.
const WIDTH: u16 = 8;
const HEIGHT: u16 = 17;
const PAPER: &str = "#1d2021";
const INK: &str = "#d8d4c7";

#[test]
fn the_screen_shows_what_guests_do() {
    let host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; 1 << 20]).expect("an image can be written");
    let writes = "blk-write:sectors=64 idle:ms=300 ".repeat(40) + "hang";
    let manifest = format!(
        "{}{}{}{}{}",
        network("lan", "10.88.0.0/24", "10.88.0.1"),
        disk("data", &image),
        Guest::new("compute", "busy:ms=600000")
            .field("memory: 256Mi")
            .manifest(),
        Guest::new("database", &writes)
            .field("disks: [{name: data, disk: data}]")
            .manifest(),
        Guest::new("web", "hang")
            .field("interfaces: [{name: eth0, network: lan}]")
            .manifest(),
    );
    host.apply(&manifest).done();
    for guest in ["compute", "database", "web"] {
        host.wait_for_phase(guest, "Running");
    }
    let typescript = host.path("typescript");
    // util-linux' script gives it a terminal and writes down what it draws there.
    let shown = format!(
        "stty rows {ROWS} cols {COLUMNS}; exec {} top --interval 500ms",
        binary("keelson").display()
    );
    let mut terminal = Command::new("script")
        .args(["--quiet", "--flush", "--command", &shown])
        .arg(&typescript)
        .env("KEELSON_SOCKET", host.path("run/keelsond.sock"))
        .env("TERM", "xterm-256color")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs `script` of util-linux");
    let screen = wait_until("the load of a guest on the screen", || {
        let drawn = fs::read(&typescript).unwrap_or_default();
        let mut parser = vt100::Parser::new(ROWS, COLUMNS, 0);
        parser.process(&drawn);
        let screen = parser.screen().clone();
        let text = screen.contents();
        let compute = text.lines().find(|line| line.contains("compute"))?;
        // Any number but none.
        let busy = compute.contains('%') && !compute.contains(" 0.0%");
        (busy && text.contains("database") && text.contains("q quit")).then_some(screen)
    });
    let mut input = terminal.stdin.take().expect("it was piped");
    input.write_all(b"q").expect("it reads keys");
    let ended = wait_until("its end", || {
        terminal.try_wait().expect("it can be asked for")
    });
    assert!(ended.success(), "{ended}");
    if let Some(path) = std::env::var_os("KEELSON_PICTURE") {
        fs::write(path, picture(&screen)).expect("the picture can be written");
    }
}

/// The screen as an SVG.
fn picture(screen: &vt100::Screen) -> String {
    let (width, height) = (COLUMNS * WIDTH + 20, ROWS * HEIGHT + 20);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"monospace\" \
         font-size=\"13\" xml:space=\"preserve\">\n<rect width=\"{width}\" height=\"{height}\" rx=\"6\" \
         fill=\"{PAPER}\"/>\n"
    );
    for row in 0..ROWS {
        for column in 0..COLUMNS {
            let Some(cell) = screen.cell(row, column) else {
                continue;
            };
            let (x, y) = (10 + column * WIDTH, 10 + row * HEIGHT);
            if cell.inverse() {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"{INK}\"/>"
                );
            }
            let text = cell.contents();
            if text.trim().is_empty() {
                continue;
            }
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            let ink = if cell.inverse() { PAPER } else { INK };
            let weight = if cell.bold() {
                " font-weight=\"bold\""
            } else {
                ""
            };
            let line = if cell.underline() {
                " text-decoration=\"underline\""
            } else {
                ""
            };
            let pale = if cell.dim() { " opacity=\"0.6\"" } else { "" };
            let y = y + HEIGHT - 4;
            let _ = writeln!(
                svg,
                "<text x=\"{x}\" y=\"{y}\" fill=\"{ink}\"{weight}{line}{pale}>{text}</text>"
            );
        }
    }
    svg + "</svg>\n"
}

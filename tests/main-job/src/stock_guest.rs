//! The show with a stock Debian kernel and an ext4 file system on its disk.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::console::Console;
use crate::host::{Host, until};
use crate::report::Report;
use crate::{FALSE_ADDRESS, GATEWAY, apply, show_adoption, show_ingress};

const FILE_BYTES: u64 = 4 << 20;
/// Pieces of 16 KiB that the guest writes, each with a sync, while its disk's process is killed.
const PIECES: u32 = 80;
const DISK_KILLS: u32 = 3;
const SPOOFED_PINGS: u64 = 3;
const PORT: u16 = 8080;

/// Runs a stock guest from its manifest to its end.
pub fn show(
    report: &mut Report,
    host: &mut Host,
    folder: &Path,
    kernel: &Path,
    initrd: &Path,
    stay: impl FnOnce(),
) -> Result<()> {
    let base = folder.join("base.img");
    let expected = write_image(folder, &base)?;
    let before = sha256(&fs::read(&base)?);
    let overlay = folder.join("data.img");
    let disk = format!(
        "path: {}, base: {{path: {}}}, size: 96Mi",
        overlay.display(),
        base.display()
    );
    let machine = format!(
        "  memory: 256Mi\n  kernel:\n    image: {}\n    initrd: {}\n    commandLine: console=ttyS0 quiet\n",
        kernel.display(),
        initrd.display()
    );
    apply(report, host, folder, &disk, &machine);
    report.step("a stock kernel reaches its user space", || {
        let line = host.console_line("web", "keelson-guest: userspace up")?;
        host.console_line("web", "keelson-guest: ready")?;
        Ok(((), line.trim().to_owned()))
    });
    let from_guest = show_guest(report, host, &expected);
    let through_kills = show_disk_kills(report, host);
    show_ingress(report, host);
    show_adoption(report, host);
    stay();
    report.step("the power button shuts it down", || {
        host.keelson(&["stop", "web"])?;
        let events = host.keelson(&["events", "web"])?;
        ensure!(!events.contains("Killed"), "it had to be killed");
        Ok(((), "it powered itself off".into()))
    });
    let image = folder.join("exported.img");
    report.step("its disk is exported, and the base is as it was", || {
        let export = ["image".as_ref(), "export".as_ref()];
        let files = [overlay.as_os_str(), image.as_os_str()];
        host.keelson_blk(&[export, files].concat())?;
        let after = sha256(&fs::read(&base)?);
        ensure!(before == after, "the base was written to");
        run(Command::new("e2fsck").args(["-fn"]).arg(&image))
            .context("the file system is broken")?;
        Ok(((), "its file system is whole".into()))
    });
    for (what, file, written) in [
        (
            "the host reads the guest's file from the image",
            "from-guest",
            from_guest,
        ),
        (
            "and the one that was written meanwhile",
            "through-kills",
            through_kills,
        ),
    ] {
        report.step(what, || {
            let written = written.context("the guest wrote nothing")?;
            let found = sha256(&read_file(folder, &image, file)?);
            ensure!(
                found == written,
                "its SHA-256 is {found}, the guest's was {written}"
            );
            Ok(((), format!("SHA-256 {}… on both sides", &found[..16])))
        });
    }
    Ok(())
}

/// A file of the file system in an image.
fn read_file(folder: &Path, image: &Path, name: &str) -> Result<Vec<u8>> {
    let copy = folder.join(name);
    run(Command::new("debugfs")
        .arg("-R")
        .arg(format!("dump /{name} {}", copy.display()))
        .arg(image))?;
    Ok(fs::read(&copy)?)
}

/// Its disk's process is killed again and again while the guest writes and syncs. Returns the
/// checksum of what it wrote.
fn show_disk_kills(report: &mut Report, host: &Host) -> Option<String> {
    report.step(
        "keelson-blk is killed while the guest writes, and nobody notices",
        || {
            let mut console = Console::open(host)?;
            let write = format!(
                "{{ ( i=0; while [ $i -lt {PIECES} ]; do dd if=/dev/urandom of=/data/through-kills \
             bs=16384 count=1 seek=$i conv=notrunc,fsync 2>/dev/null || echo failed; \
             i=$((i+1)); done; echo written ) > /tmp/through-kills 2>&1 & }}"
            );
            console.run(&write)?;
            let mut amid = 0;
            for _ in 0..DISK_KILLS {
                host.kill_disk_backend()?;
                let said = console.run("cat /tmp/through-kills")?;
                amid += u32::from(!said.contains("written"));
            }
            ensure!(amid > 0, "it had written everything before the first kill");
            let mut said = String::new();
            until("the guest has written", || {
                said = console.run("cat /tmp/through-kills")?;
                Ok(said.contains("written"))
            })?;
            ensure!(!said.contains("failed"), "it says {said}");
            // From the disk, not from memory.
            console.run("sync && echo 3 > /proc/sys/vm/drop_caches")?;
            let sum = checksum(&mut console, "/data/through-kills")?;
            let errors = console.run("dmesg | grep -c 'I/O error' || true")?;
            ensure!(errors.trim() == "0", "its kernel saw {errors} errors");
            let seen = format!(
                "{amid} kills while it wrote {} KiB in pieces, no error in its kernel",
                PIECES * 16
            );
            Ok((sum, seen))
        },
    )
}

/// The SHA-256 of one of the guest's files, as it sees it.
fn checksum(console: &mut Console, file: &str) -> Result<String> {
    let said = console.run(&format!("sha256sum {file}"))?;
    let sum = said.split_whitespace().next().unwrap_or_default();
    ensure!(sum.len() == 64, "it says {said}");
    Ok(sum.to_owned())
}

/// What the guest does itself, told over its console. Returns the checksum of what it wrote.
fn show_guest(report: &mut Report, host: &Host, expected: &str) -> Option<String> {
    let mut console = report.step("its console gives a root shell", || {
        let mut console = Console::open(host)?;
        let user = console.run("id -un; uname -r")?;
        Ok((
            console,
            user.split_whitespace()
                .collect::<Vec<_>>()
                .join(" on Linux "),
        ))
    })?;
    report.step("it reads the file that the host wrote", || {
        let said = console.run("sha256sum /data/from-host")?;
        ensure!(
            said.starts_with(expected),
            "its SHA-256 is {said}, the host's {expected}"
        );
        Ok(((), format!("SHA-256 {}… on both sides", &expected[..16])))
    });
    let written = report.step("it writes a file and syncs it", || {
        console
            .run("dd if=/dev/urandom of=/data/from-guest bs=65536 count=16 2>/dev/null && sync")?;
        let sum = checksum(&mut console, "/data/from-guest")?;
        let seen = format!("SHA-256 {}…", &sum[..16]);
        Ok((sum, seen))
    });
    report.step("it pings its gateway, the host", || {
        let said = console.run(&format!("ping -c 3 -W 5 {GATEWAY}"))?;
        let line = said.lines().find(|line| line.contains("packets received"));
        Ok(((), line.unwrap_or_default().trim().to_owned()))
    });
    report.step("it fetches a page from the host over HTTP", || {
        let server = serve_once(expected)?;
        let said = console.run(&format!("wget -q -O - http://{GATEWAY}:{PORT}/"))?;
        let _ = server.join();
        ensure!(said.contains(expected), "it got {said:?}");
        Ok(((), format!("{} bytes arrived as sent", expected.len())))
    });
    report.step("what it sends under a false address is dropped", || {
        let before = host.dropped("web", "fromGuest", "spoofed-ipv4")?;
        console.run(&format!("ip addr add {FALSE_ADDRESS}/32 dev eth0"))?;
        let ping = format!("ping -c {SPOOFED_PINGS} -W 1 -I {FALSE_ADDRESS} {GATEWAY}");
        console.run(&format!("! {ping}"))?;
        console.run(&format!("ip addr del {FALSE_ADDRESS}/32 dev eth0"))?;
        let dropped = host.dropped("web", "fromGuest", "spoofed-ipv4")? - before;
        ensure!(dropped >= SPOOFED_PINGS, "only {dropped} were counted");
        Ok((
            (),
            format!("{dropped} pings counted as spoofed-ipv4, none answered"),
        ))
    });
    written
}

/// Makes an ext4 image with a file of random content; the content's checksum.
fn write_image(folder: &Path, image: &Path) -> Result<String> {
    let content = folder.join("content");
    fs::create_dir(&content)?;
    let mut bytes = Vec::new();
    File::open("/dev/urandom")?
        .take(FILE_BYTES)
        .read_to_end(&mut bytes)?;
    fs::write(content.join("from-host"), &bytes)?;
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&content)
        .arg(image)
        .arg("64M"))?;
    Ok(sha256(&bytes))
}

fn sha256(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Answers one HTTP request with `body`.
fn serve_once(body: &str) -> Result<std::thread::JoinHandle<std::io::Result<()>>> {
    let listener = TcpListener::bind((GATEWAY, PORT)).context("listen for HTTP")?;
    let answer = format!(
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    Ok(std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut request = [0; 1024];
        let _ = stream.read(&mut request)?;
        stream.write_all(answer.as_bytes())
    }))
}

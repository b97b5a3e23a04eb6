//! What can't be run is refused with one sentence and the right exit code.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use keelson_vmm_tests::{Backend, Ended, GuestBuilder, Image, Namespaces, payload};
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIG: i32 = 2;
const KERNEL: i32 = 3;
const NO_KVM: i32 = 4;
const DEVICE: i32 = 5;

#[test]
fn a_wrong_field_is_named() {
    let cases: [(&str, Value, &str); 12] = [
        ("/surprise", json!(1), "surprise"),
        ("/memory/swap", json!(1), "swap"),
        ("/vcpus", json!(0), "vcpus"),
        ("/vcpus", json!(200), "vcpus"),
        ("/vcpus", json!("two"), "line"),
        ("/memory/size_mib", json!(0), "memory.size_mib"),
        ("/memory/size_mib", json!(u64::MAX), "memory.size_mib"),
        ("/name", json!(""), "name"),
        ("/name", json!("../../etc"), "name"),
        (
            "/kernel/command_line",
            json!("two\nlines"),
            "kernel.command_line",
        ),
        (
            "/kernel/command_line",
            json!("x".repeat(5000)),
            "kernel.command_line",
        ),
        ("/on_reboot", json!("explode"), "explode"),
    ];
    for (pointer, value, word) in cases {
        GuestBuilder::new("hello")
            .set(pointer, value)
            .run()
            .assert_refused(CONFIG, &[word]);
    }
}

#[test]
fn two_devices_with_one_name_are_refused() {
    let builder = GuestBuilder::new("hello");
    let image = Image::create(64);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let ended = builder
        .disk("a", &backend, false, 1)
        .interface("a", "tap0", "52:54:00:00:00:01")
        .run();
    ended.assert_refused(CONFIG, &["id", "`a`"]);
}

#[test]
fn a_disk_beside_memory_that_nobody_shares_is_refused() {
    let builder = GuestBuilder::new("hello");
    let image = Image::create(64);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let ended = builder
        .disk("a", &backend, false, 1)
        .set("/memory/shared", false)
        .run();
    ended.assert_refused(CONFIG, &["memory.shared", "backends"]);
}

#[test]
fn a_bad_address_is_refused() {
    let ended = GuestBuilder::new("hello")
        .interface("a", "tap0", "52:54:00:00:01")
        .run();
    ended.assert_refused(CONFIG, &["MAC"]);
    let ended = GuestBuilder::new("hello")
        .interface("a", "tap0", "01:00:5e:00:00:01")
        .run();
    ended.assert_refused(CONFIG, &["MAC"]);
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    let random: Vec<u8> = (0..100_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1])
        .collect();
    let cases: [(&str, Vec<u8>); 5] = [
        ("empty", Vec::new()),
        ("short", b"\x7fELF".to_vec()),
        ("text", b"#!/bin/sh\necho I am no kernel\n".to_vec()),
        ("random", random),
        ("zeros", vec![0; 1 << 20]),
    ];
    for (name, contents) in cases {
        boot_file(name, &contents).assert_refused(KERNEL, &[name]);
    }
}

#[test]
fn a_truncated_elf_is_refused() {
    let image = fs::read(payload()).expect("the payload is built");
    for length in [16, 63, 64, 100, 5000, 0x3000] {
        boot_file("truncated", &image[..length]).assert_refused(KERNEL, &["truncated"]);
    }
}

#[test]
fn a_corrupt_elf_is_refused() {
    // Offsets of the ELF header and of the first program header: (what, offset, bytes).
    let cases: [(&str, usize, &[u8]); 8] = [
        ("class", 4, &[1]),
        ("byte-order", 5, &[2]),
        ("another-architecture", 18, &[183, 0]), // EM_AARCH64
        ("program-headers-beyond-the-end", 32, &[0xff; 8]),
        (
            "segment-beyond-the-file",
            64 + 8,
            &[0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0],
        ),
        (
            "segment-beyond-the-memory",
            64 + 24,
            &[0, 0, 0, 0, 0xff, 0, 0, 0],
        ),
        ("segment-wraps", 64 + 24, &[0xff; 8]),
        (
            "segment-larger-than-the-file",
            64 + 32,
            &[0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0],
        ),
    ];
    let good = fs::read(payload()).expect("the payload is built");
    for (name, offset, bytes) in cases {
        let mut image = good.clone();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        boot_file(name, &image).assert_refused(KERNEL, &[name]);
    }
}

/// A bzImage by its header (Documentation/arch/x86/boot.rst) whose kernel isn't all there.
#[test]
fn a_truncated_bzimage_is_refused() {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1; // setup_sects
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x211] = 1; // loaded high
    image[0x1f4..0x1f8].copy_from_slice(&0x0010_0000_u32.to_le_bytes()); // syssize: 16 MiB
    image[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes()); // xloadflags: 64-bit entry
    for length in [0x1ff, 0x206, 0x264, 0x400] {
        boot_file("truncated-bzimage", &image[..length])
            .assert_refused(KERNEL, &["truncated-bzimage"]);
    }
}

/// A bzImage whose header is that of a 32-bit kernel, or of one before the 64-bit entry point.
#[test]
fn a_bzimage_without_a_64_bit_entry_is_refused() {
    for (name, protocol, flags) in [("32-bit", 0x020f_u16, 0_u16), ("old", 0x020b, 1)] {
        let mut image = vec![0; 0x1000];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&protocol.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
        boot_file(name, &image).assert_refused(KERNEL, &[name, "64-bit"]);
    }
}

#[test]
fn a_missing_kernel_is_refused() {
    let builder = GuestBuilder::new("hello");
    let path = builder.directory().join("not-there");
    builder
        .set("/kernel/image", path.to_str())
        .run()
        .assert_refused(KERNEL, &["not-there"]);
}

#[test]
fn a_directory_is_no_kernel_and_no_initrd() {
    for field in ["/kernel/image", "/kernel/initrd"] {
        let builder = GuestBuilder::new("hello");
        let path = builder.directory().join("folder");
        fs::create_dir(&path).expect("a directory can be made");
        builder
            .set(field, path.to_str())
            .run()
            .assert_refused(KERNEL, &["folder"]);
    }
}

#[test]
fn an_initrd_that_is_larger_than_the_memory_is_refused() {
    let builder = GuestBuilder::new("hello");
    let path = builder.directory().join("huge-initrd");
    let file = fs::File::create(&path).expect("a file can be made");
    file.set_len(65 << 20).expect("a sparse file can be made");
    builder
        .set("/kernel/initrd", path.to_str())
        .run()
        .assert_refused(KERNEL, &["huge-initrd"]);
}

#[test]
fn an_empty_initrd_is_no_crash() {
    let builder = GuestBuilder::new("initrd");
    let path = builder.directory().join("empty-initrd");
    fs::write(&path, []).expect("a file can be made");
    let ended = builder.set("/kernel/initrd", path.to_str()).run();
    // Refused or taken as none; both are right.
    if ended.code == Some(0) {
        ended.line("payload: initrd ok bytes=0");
    } else {
        ended.assert_refused(KERNEL, &["empty-initrd"]);
    }
}

#[test]
fn a_disk_without_a_backend_is_refused() {
    let builder = GuestBuilder::new("hello");
    let socket = builder.directory().join("nobody.sock");
    let disks = json!([{"id": "a", "socket": socket}]);
    builder
        .set("/disks", disks)
        .run()
        .assert_refused(DEVICE, &["nobody.sock"]);
}

#[test]
fn a_backend_that_goes_away_answers_nonsense_or_nothing_is_refused() {
    // A header's flags: version 1, and that it is a reply (vhost-user, Message header).
    const REPLY: u32 = 1 | 1 << 2;
    let all_features = |request: &[u8]| {
        let size = 8_u32.to_le_bytes();
        let header = [&request[..4], &REPLY.to_le_bytes(), &size].concat();
        Some([header, vec![0xff; 8]].concat())
    };
    let garbage = |_: &[u8]| Some((0..4096_u32).map(|n| (n * 167 % 251) as u8).collect());
    let huge = |request: &[u8]| {
        let header = [&request[..4], &REPLY.to_le_bytes(), &[0xff; 4]].concat();
        Some(header)
    };
    refused_backend("gone.sock", |_| None);
    refused_backend("garbage.sock", garbage);
    refused_backend("huge.sock", huge);
    // It offers all that there is, and a number of queues and a configuration that are none.
    refused_backend("everything.sock", all_features);
    refused_backend("silent.sock", |_| Some(Vec::new()));
}

/// A guest whose disk's backend answers each message so, or closes its connection, is refused.
fn refused_backend(name: &str, answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) {
    let builder = GuestBuilder::new("hello");
    let socket = builder.directory().join(name);
    let listener = UnixListener::bind(&socket).expect("a socket");
    // It ends with the VMM, or stays in `accept` until the test's process ends.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("the VMM connects");
            let mut message = [0; 4096];
            while let Ok(12..) = stream.read(&mut message)
                && let Some(bytes) = answer(&message)
                && stream.write_all(&bytes).is_ok()
            {}
        }
    });
    let disks = json!([{"id": "a", "socket": socket, "read_only": true}]);
    let ended = builder.set("/disks", disks).run();
    ended.assert_refused(DEVICE, &[name]);
}

#[test]
fn a_backend_that_disagrees_about_writing_is_refused() {
    let builder = GuestBuilder::new("hello");
    let image = Image::create(64);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &["--read-only"]);
    let ended = builder.disk("a", &backend, false, 1).run();
    assert!(matches!(ended.code, Some(CONFIG | DEVICE)), "{ended:#?}");
    assert!(ended.reason().contains("read"), "{ended:#?}");
}

#[test]
fn an_interface_without_a_tap_is_refused() {
    let ended = GuestBuilder::new("hello")
        .interface("a", "not-a-tap0", "52:54:00:00:00:01")
        .run();
    ended.assert_refused(DEVICE, &["not-a-tap0"]);
}

#[test]
fn a_host_without_kvm_is_told_so() {
    let builder = GuestBuilder::new("hello");
    let namespaces = Namespaces::enter();
    namespaces.hide_kvm();
    builder.run().assert_refused(NO_KVM, &["/dev/kvm"]);
}

#[test]
fn a_tap_that_is_in_use_is_refused() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let guest = |steps| GuestBuilder::new(steps).interface("eth0", "payload0", "52:54:00:00:00:01");
    let mut first = guest("hang").start();
    first.wait_for_line("payload: hang ok");
    guest("hello").run().assert_refused(DEVICE, &["payload0"]);
    assert!(first.is_running());
}

#[test]
fn a_backend_that_serves_another_guest_is_refused() {
    let image = Image::create(64);
    let directory = TempDir::new().expect("there is a place for temporary files");
    let backend = Backend::start(image.path(), &directory.path().join("taken.sock"), &[]);
    let guest = |steps| GuestBuilder::new(steps).disk("disk", &backend, false, 1);
    let mut first = guest("hang").start();
    first.wait_for_line("payload: hang ok");
    guest("hello").run().assert_refused(DEVICE, &["taken.sock"]);
    assert!(first.is_running());
}

fn boot_file(name: &str, contents: &[u8]) -> Ended {
    let builder = GuestBuilder::new("hello");
    let path = builder.directory().join(name);
    fs::write(&path, contents).expect("the file can be written");
    builder.set("/kernel/image", path.to_str()).run()
}

#[test]
fn processors_and_nodes_that_the_host_lacks_are_refused() {
    let refused = |pointer: &str, value: Value, code, words: &[&str]| {
        GuestBuilder::new("hello")
            .set(pointer, value)
            .run()
            .assert_refused(code, words);
    };
    refused(
        "/cpu",
        json!({"pinning": [[8000]]}),
        1,
        &["cpu.pinning", "8000"],
    );
    refused(
        "/cpu",
        json!({"pinning": [[0], [0]]}),
        2,
        &["cpu.pinning", "2 lists"],
    );
    let six = json!({"topology": {"sockets": 1, "cores": 2, "threads": 3}});
    refused("/cpu", six, 2, &["cpu.topology", "are 6", "vcpus is 1"]);
    refused(
        "/memory/numa_node",
        json!(1000),
        1,
        &["memory.numa_node", "1000"],
    );
    refused(
        "/memory/numa_node",
        json!(1024),
        2,
        &["memory.numa_node", "1023"],
    );
    refused(
        "/cpu",
        json!({"template": "pentium"}),
        2,
        &["cpu.template", "x86-64-v2"],
    );
    refused("/vcpus", json!(65), 2, &["vcpus", "1 to 64"]);
}

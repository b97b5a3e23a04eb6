//! Every field of a configuration, of a wrong type and out of its range.

use std::path::Path;

use serde_json::{Value, json};

use super::GuestConfig;

/// A guest with all that a guest can have.
fn whole() -> Value {
    json!({
        "name": "web",
        "vcpus": 2,
        "cpu": {
            "topology": {"sockets": 1, "cores": 2, "threads": 1},
            "template": "x86-64-v2",
            "pinning": [[0], [1]],
        },
        "memory": {"size_mib": 64, "hugepages": "2MiB", "prefault": true, "numa_node": 0, "shared": true},
        "kernel": {"image": "/vmlinux", "initrd": "/initrd", "command_line": "console=ttyS0"},
        "console": {"device": "virtio", "socket": "/run/console.sock", "log": "/run/console.log", "log_limit_mib": 16},
        "disks": [{"id": "root", "socket": "/run/root.sock", "read_only": false, "queues": 1, "queue_size": 256}],
        "interfaces": [{"id": "eth0", "tap": "tap0", "mac": "52:54:00:00:00:01", "mtu": 1500}],
        "balloon": {"size_mib": 0, "deflate_on_oom": true, "free_page_reporting": true, "statistics": true},
        "vsock": {"cid": 3, "socket": "/run/vsock.sock"},
        "panic": {"action": "none"},
        "watchdog": {"action": "reset"},
        "on_reboot": "reboot",
    })
}

/// Values of the right type that a field may not have.
fn out_of_range() -> Vec<(&'static str, Vec<Value>)> {
    let long = "x".repeat(64);
    let socket = format!("/run/{}", "x".repeat(103));
    vec![
        (
            "/name",
            vec![json!(""), json!("a/b"), json!("ä"), json!(long)],
        ),
        (
            "/vcpus",
            vec![json!(0), json!(65), json!(256), json!(-1), json!(1.5)],
        ),
        (
            "/cpu/topology/sockets",
            vec![json!(0), json!(2), json!(256)],
        ),
        ("/cpu/topology/cores", vec![json!(0), json!(3), json!(-1)]),
        ("/cpu/topology/threads", vec![json!(0), json!(2)]),
        ("/cpu/template", vec![json!("x86-64-v9"), json!("")]),
        ("/cpu/pinning", vec![json!([[0]]), json!([[0], []])]),
        (
            "/cpu/pinning/1/0",
            vec![json!(8192), json!(65536), json!(-1)],
        ),
        (
            "/memory/size_mib",
            vec![
                json!(0),
                json!(15),
                json!(65),
                json!((4 << 20) + 2),
                json!(u64::MAX),
            ],
        ),
        ("/memory/hugepages", vec![json!("4KiB"), json!("1GiB")]),
        (
            "/memory/numa_node",
            vec![json!(1024), json!(65536), json!(-1)],
        ),
        ("/memory/shared", vec![json!(false)]),
        ("/kernel/image", vec![json!("")]),
        ("/kernel/initrd", vec![json!("")]),
        (
            "/kernel/command_line",
            vec![json!("a\nb"), json!("a\0"), json!("x".repeat(2048))],
        ),
        ("/console/socket", vec![json!(""), json!(socket)]),
        ("/console/log", vec![json!("")]),
        (
            "/console/log_limit_mib",
            vec![json!(0), json!(4097), json!(-1)],
        ),
        ("/disks/0/id", vec![json!(""), json!("eth0"), json!("a b")]),
        ("/disks/0/socket", vec![json!(""), json!(socket)]),
        ("/disks/0/queues", vec![json!(0), json!(17), json!(65536)]),
        (
            "/disks/0/queue_size",
            vec![json!(0), json!(1), json!(3), json!(2048), json!(65536)],
        ),
        ("/interfaces/0/id", vec![json!(""), json!("root")]),
        (
            "/interfaces/0/tap",
            vec![
                json!(""),
                json!(".."),
                json!("a/b"),
                json!("tap%d"),
                json!("x".repeat(16)),
            ],
        ),
        (
            "/interfaces/0/mac",
            vec![
                json!(""),
                json!("52:54:00:00:00"),
                json!("01:00:5e:00:00:01"),
            ],
        ),
        (
            "/interfaces/0/mtu",
            vec![json!(67), json!(65536), json!(-1)],
        ),
        (
            "/balloon/size_mib",
            vec![json!(49), json!(u64::MAX), json!(-1)],
        ),
        (
            "/vsock/cid",
            vec![json!(2), json!(u32::MAX), json!(1_u64 << 32)],
        ),
        ("/vsock/socket", vec![json!(""), json!(socket)]),
        ("/panic/action", vec![json!("explode")]),
        ("/watchdog/action", vec![json!("explode")]),
        ("/on_reboot", vec![json!("explode")]),
    ]
}

/// The message of its refusal; `None` if it is taken.
fn refusal(config: &Value) -> Option<String> {
    let parsed = GuestConfig::parse(config.to_string().as_bytes(), Path::new("guest.json"));
    parsed.err().map(|e| e.to_string())
}

/// Fields that hold no others, as JSON pointers.
fn leaves(value: &Value, at: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, field)| leaves(field, &format!("{at}/{name}"), into)),
        Value::Array(items) => (0..).zip(items).for_each(|(index, item): (usize, _)| {
            leaves(item, &format!("{at}/{index}"), into);
        }),
        _ => into.push(at.to_owned()),
    }
}

/// The name of a pointer's field or, for what is compared with others, of the one around it.
fn names(pointer: &str) -> Vec<&str> {
    let mut names: Vec<&str> = pointer.split('/').collect();
    names.retain(|name| !name.is_empty() && name.parse::<usize>().is_err());
    names
}

fn with(pointer: &str, value: &Value) -> Value {
    let mut config = whole();
    *config.pointer_mut(pointer).unwrap() = value.clone();
    config
}

#[test]
fn a_field_of_a_wrong_type_is_named() {
    assert_eq!(refusal(&whole()), None);
    let mut pointers = Vec::new();
    leaves(&whole(), "", &mut pointers);
    assert!(pointers.len() > 30, "{pointers:?}");
    for pointer in pointers {
        let message = refusal(&with(&pointer, &json!({"no": "such"})));
        let message = message.unwrap_or_else(|| panic!("{pointer} is taken"));
        let name = names(&pointer).last().copied().unwrap_or_default();
        assert!(message.contains(name), "{pointer}: {message}");
    }
}

#[test]
fn a_field_out_of_its_range_is_named() {
    for (pointer, values) in out_of_range() {
        for value in values {
            let message = refusal(&with(pointer, &value));
            let message = message.unwrap_or_else(|| panic!("{pointer} may be {value}"));
            assert!(
                names(pointer).iter().any(|name| message.contains(name)),
                "{pointer}: {value}: {message}"
            );
        }
    }
}

//! The URL that names a store.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::time::Duration;

use keelson_controlplane::{StateError, StoreUrl};

fn reason(url: &str) -> String {
    match url.parse::<StoreUrl>() {
        Err(StateError::InvalidUrl { reason, .. }) => reason,
        other => panic!("{url}: {other:?}"),
    }
}

#[test]
fn etcd() {
    let url = "etcd:http://a:2379,http://[::1]:1/?prefix=/k/&timeout_ms=7&user=u&password_file=/f";
    let Ok(StoreUrl::Etcd(options)) = url.parse() else {
        panic!("{url}");
    };
    assert_eq!(options.endpoints, ["http://a:2379", "http://[::1]:1"]);
    assert_eq!(options.prefix, b"/k/");
    assert_eq!(options.timeout, Duration::from_millis(7));
    assert_eq!(options.credentials.unwrap().user, "u");
}

#[test]
fn certificates_are_named_by_files() {
    let url = "cluster:https://a:1,https://b:1?ca_file=/ca&cert_file=/c&key_file=/k";
    let StoreUrl::Etcd(options) = url.parse().unwrap() else {
        panic!("{url}")
    };
    assert_eq!(options.endpoints, ["https://a:1", "https://b:1"]);
    assert_eq!(options.tls.ca_file.unwrap().to_str(), Some("/ca"));
    let identity = options.tls.identity.unwrap();
    assert_eq!(identity.cert_file.to_str(), Some("/c"));
    assert_eq!(identity.key_file.to_str(), Some("/k"));
}

#[test]
fn wrong_ones_say_why() {
    for (url, why) in [
        ("/var/lib", "no scheme"),
        ("redis:x", "unknown"),
        ("cluster:x", "http://HOST:PORT"),
        ("embedded:state", "absolute"),
        ("embedded:/s?prefix=x", "unknown for this backend"),
        ("embedded:/s?cache_mib=x", "give a number"),
        ("etcd:", "http://HOST:PORT"),
        ("etcd:http://a", "http://HOST:PORT"),
        ("etcd:http://a:0", "http://HOST:PORT"),
        ("etcd:http://a:1/x", "http://HOST:PORT"),
        ("etcd:http://a:1,", "http://HOST:PORT"),
        ("etcd:https://a:1?cert_file=/c", "belong together"),
        ("cluster:ftp://a:1", "https://HOST:PORT"),
        ("etcd:http://a:1?timeout_ms=0", "at least 1"),
        ("etcd:http://a:1?user=u", "belong together"),
        ("etcd:http://a:1?prefix=a&prefix=b", "twice"),
    ] {
        assert!(reason(url).contains(why), "{url}: {}", reason(url));
    }
}

#[test]
fn passwords_are_not_repeated() {
    let error = "etcd:http://u:secret@a:1".parse::<StoreUrl>().unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
}

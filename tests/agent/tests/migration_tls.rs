//! Guests that move by TLS, and hosts whose certificates don't fit: they are told so, and the guest stays.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keelson_agent_tests::{Fleet, Guest, cluster, settings};
use keelson_state_tests::Cluster;
use keelson_vmm_tests::wait_until;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType, date_time_ymd,
};
use serde_json::Value;
use tempfile::TempDir;

const FAILED: i32 = 1;
const LEASE_SECONDS: u64 = 90;
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Who signs certificates.
struct Authority(Issuer<'static, KeyPair>, String);

impl Authority {
    fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("generated");
        let mut params = CertificateParams::new(Vec::new()).expect("valid");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("signed");
        Self(Issuer::new(params, key), certificate.pem())
    }
}

/// The files of one host.
struct Files(TempDir);

impl Files {
    /// A certificate of `own` for this process's address, and trust in `trusted`.
    fn new(own: &Authority, trusted: &Authority) -> Self {
        let files = Self(TempDir::new().expect("there is a place for temporary files"));
        files.certify(own, LOCALHOST, 4096);
        files.trust(trusted);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn trust(&self, authority: &Authority) {
        fs::write(self.path("ca.pem"), &authority.1).expect("written");
    }

    /// Replaces the certificate by one that holds until a year.
    fn certify(&self, authority: &Authority, address: IpAddr, until: i32) {
        let key = KeyPair::generate().expect("generated");
        let mut params = CertificateParams::new(Vec::new()).expect("valid");
        params.subject_alt_names = vec![SanType::IpAddress(address)];
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &authority.0).expect("signed");
        fs::write(self.path("cert.pem"), certificate.pem()).expect("written");
        fs::write(self.path("key.pem"), key.serialize_pem()).expect("written");
    }

    fn settings(&self) -> String {
        ["cert", "key", "trusted_ca"]
            .map(|name| {
                let file = self.path(&format!("{}.pem", name.trim_start_matches("trusted_")));
                format!("migration_{name}_file = \"{}\"\n", file.display())
            })
            .concat()
    }
}

fn fleet() -> (Fleet, Cluster) {
    let (namespaces, cluster, urls) = cluster(1);
    let fleet = Fleet::start_with_leases(namespaces, 2, "cluster", &urls, LEASE_SECONDS);
    (fleet, cluster)
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound")
}

/// Starts a host's agent anew; where it listens for guests.
fn configure(fleet: &mut Fleet, host: usize, more: &str) -> SocketAddr {
    let listen = free_address();
    let name = ["a", "b"][host];
    let migration = format!("migration_listen = \"{listen}\"\n");
    let host = &mut fleet.hosts[host];
    host.configure(&(settings(name, LEASE_SECONDS) + &migration + more));
    host.kill_agent();
    // What the killed agent had forked holds its locks for a moment.
    while !host.start_agent_with(&[]) {}
    listen
}

/// A guest that runs on the first host.
fn start(fleet: &Fleet, steps: &str) {
    fleet.hosts[0].keelson(&["cordon", "b"]).done();
    let guest = Guest::new("moves", steps);
    fleet.hosts[0].apply(&guest.manifest()).done();
    assert_eq!(fleet.wait_until_running(0, "moves"), 0);
    fleet.hosts[0].keelson(&["uncordon", "b"]).done();
}

fn move_to(fleet: &Fleet, name: &str) -> Value {
    let text = fleet.hosts[0].keelson(&["migrate", "moves", name, "-o", "json"]);
    serde_json::from_str(&text.done()).expect("JSON")
}

/// Forwards connections to `to`; what was sent there.
fn overheard(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    let ear = Arc::clone(&heard);
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let server = TcpStream::connect(to).expect("the agent listens");
            let (mut back, mut answers) = (
                client.try_clone().expect("cloned"),
                server.try_clone().expect("cloned"),
            );
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut answers, &mut back);
                let _ = back.shutdown(Shutdown::Both);
            });
            let ear = Arc::clone(&ear);
            std::thread::spawn(move || forward(client, server, &ear));
        }
    });
    (address, heard)
}

fn forward(mut from: TcpStream, mut to: TcpStream, ear: &Mutex<Vec<u8>>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        ear.lock().expect("not poisoned").extend(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn contains(heard: &Mutex<Vec<u8>>, words: &[u8]) -> bool {
    let heard = heard.lock().expect("not poisoned");
    heard.windows(words.len()).any(|window| window == words)
}

#[test]
fn guests_move_by_tls_and_nobody_listens() {
    let (mut fleet, _cluster) = fleet();
    start(&fleet, "remember:mib=16");
    fleet.hosts[0].wait_for_console("moves", "payload: remember ready");
    // What the stream of a virtual machine begins with is there, without TLS.
    for (tls, seen) in [(false, true), (true, false)] {
        let authority = Authority::new("ours");
        let files = [(); 2].map(|()| Files::new(&authority, &authority));
        let settings = files.each_ref().map(|files| {
            let settings = files.settings();
            if tls { settings } else { String::new() }
        });
        configure(&mut fleet, 0, &settings[0]);
        let listen = free_address();
        let (advertised, heard) = overheard(listen);
        let host = &mut fleet.hosts[1];
        host.configure(&format!(
            "{}migration_listen = \"{listen}\"\nmigration_advertise = \"{advertised}\"\n{}",
            keelson_agent_tests::settings("b", LEASE_SECONDS),
            settings[1]
        ));
        host.kill_agent();
        while !host.start_agent_with(&[]) {}
        let begun = Instant::now();
        let moved = move_to(&fleet, "b");
        println!(
            "with TLS: {tls}; {} ms, of which it stood still for {} ms; {} bytes",
            begun.elapsed().as_millis(),
            moved["downtimeMilliseconds"],
            moved["progress"]["transferredBytes"]
        );
        assert_eq!(moved["phase"], "Completed", "{moved:#}");
        assert_eq!(contains(&heard, b"\"guest\":\"moves\""), seen);
        assert!(heard.lock().expect("not poisoned").len() > 16 << 20);
        let rounds = || {
            let log = fleet.hosts[1].keelson(&["logs", "moves"]).output;
            assert!(!log.contains("FAIL"), "{log}");
            log.matches("remember round=").count()
        };
        let before = rounds();
        fleet.hosts[1].type_line("moves", "next");
        wait_until("check of its memory", || (rounds() > before).then_some(()));
        let back = move_to(&fleet, "a");
        assert_eq!(back["phase"], "Completed", "{back:#}");
    }
}

#[test]
fn a_guest_stays_where_certificates_do_not_fit() {
    let (mut fleet, _cluster) = fleet();
    start(&fleet, "scribble:mib=4");
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    let [here, there] = [(); 2].map(|()| Files::new(&ours, &ours));
    let refused = |fleet: &Fleet, words: &[&str]| {
        let said = fleet.hosts[0].keelson(&["migrate", "moves", "b"]);
        println!("{}", said.errors);
        said.refused(FAILED, words);
        let status = fleet.hosts[0].wait_for_phase("moves", "Running");
        assert_eq!(status["restarts"], 0, "{status:#}");
        assert_eq!(fleet.place_of(0, "moves"), Some(0));
    };
    configure(&mut fleet, 0, "");
    configure(&mut fleet, 1, &there.settings());
    refused(&fleet, &["it takes guests by TLS alone"]);
    configure(&mut fleet, 0, &here.settings());
    configure(&mut fleet, 1, "");
    refused(&fleet, &["it has no certificate"]);

    let listen = configure(&mut fleet, 1, &there.settings());
    // From here on no agent is started anew: changed files are read again.
    there.trust(&others);
    refused(&fleet, &["the agent of b", "UnknownCA"]);
    there.trust(&ours);
    there.certify(&others, LOCALHOST, 4096);
    refused(&fleet, &["the agent of b", "UnknownIssuer"]);
    there.certify(&ours, LOCALHOST, 2002);
    refused(&fleet, &["the agent of b", "expired"]);
    there.certify(&ours, Ipv4Addr::new(127, 0, 0, 2).into(), 4096);
    refused(&fleet, &["the agent of b", "127.0.0.2"]);
    there.certify(&ours, LOCALHOST, 4096);
    here.certify(&ours, LOCALHOST, 2002);
    refused(&fleet, &["the agent of b", "CertificateExpired"]);

    // Whoever speaks no TLS is told so, whatever the ticket says.
    let mut plain = TcpStream::connect(listen).expect("it listens");
    plain.write_all(b"{\"version\":1}\n").expect("sent");
    let mut line = String::new();
    BufReader::new(plain).read_line(&mut line).expect("read");
    assert!(line.contains("by TLS alone"), "{line}");
    here.certify(&ours, LOCALHOST, 4096);
    assert_eq!(move_to(&fleet, "b")["phase"], "Completed");
}

#[test]
fn who_speaks_tls_without_need_is_turned_away_at_once() {
    let (mut fleet, _cluster) = fleet();
    let listen = configure(&mut fleet, 1, "");
    let begun = Instant::now();
    let mut hello = TcpStream::connect(listen).expect("it listens");
    hello.write_all(&[22, 3, 1, 0, 200]).expect("sent");
    let mut answer = Vec::new();
    // It may be reset, since it was not read.
    let _ = hello.read_to_end(&mut answer);
    assert_eq!(answer, b"");
    assert!(begun.elapsed() < Duration::from_secs(5));
    wait_until("reason in the log", || {
        fleet.hosts[1]
            .agent_log()
            .contains("speaks TLS")
            .then_some(())
    });
}

#[test]
fn certificates_that_are_no_use_are_refused_when_the_agent_starts() {
    let (mut fleet, _cluster) = fleet();
    let authority = Authority::new("ours");
    let files = Files::new(&authority, &authority);
    let host = &mut fleet.hosts[0];
    host.kill_agent();
    let own = settings("a", LEASE_SECONDS);
    let refused = |settings: &str, words: &[&str]| {
        host.configure(&(own.clone() + settings));
        let said = host.refused_agent();
        println!("{}", said.errors);
        said.refused(FAILED, words);
    };
    let whole = files.settings();
    let (first, _) = whole.split_once('\n').expect("several lines");
    refused(&format!("{first}\n"), &["migration_key_file", "together"]);
    fs::write(files.path("key.pem"), "nonsense").expect("written");
    refused(&whole, &["key.pem", "private key"]);
    fs::remove_file(files.path("ca.pem")).expect("it is there");
    refused(&whole, &["ca.pem"]);
}

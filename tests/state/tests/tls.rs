//! TLS between clients and members, and among members.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use futures::StreamExt as _;
use keelson_controlplane::{PutRequest, StateStoreExt as _, WatchRequest};
use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program, address, etcdctl};
use pb::auth_client::AuthClient;
use pb::kv_client::KvClient;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use tempfile::TempDir;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// Three members and their clients, each with a certificate; who has none is turned away.
#[tokio::test]
async fn everybody_shows_a_certificate() {
    let certificates = Certificates::new();
    let tls = certificates.client("anne");
    let cluster =
        Cluster::start_with(Program::KeelsonState, 3, &certificates.flags(), Some(tls)).await;
    let channel = cluster.connect(1).await;
    let put = pb::PutRequest {
        key: "key".into(),
        value: "value".into(),
        ..pb::PutRequest::default()
    };
    KvClient::new(channel).put(put).await.unwrap();

    let url = cluster.client_url(2);
    let read = certificates.etcdctl(url, Some("anne"), &["get", "key"]);
    assert_eq!(
        String::from_utf8_lossy(&read.stdout),
        "key\nvalue\n",
        "{read:?}"
    );
    assert!(
        !certificates
            .etcdctl(url, None, &["get", "key"])
            .status
            .success()
    );
    let others = Certificates::new();
    others.client("anne");
    let forged = certificates.etcdctl_with(url, Some(&others.path("anne")), &["get", "key"]);
    assert!(!forged.status.success());
    let plain = Command::new(etcdctl())
        .args(["--endpoints", &url.replace("https", "http"), "get", "key"])
        .output()
        .unwrap();
    assert!(!plain.status.success());
}

/// Certificates are replaced while members run: new connections, also among members, have the new
/// ones; what makes no sense is not used.
#[tokio::test]
async fn certificates_change() {
    let old = Certificates::new();
    let tls = old.client("anne");
    let mut cluster = Cluster::start_with(Program::KeelsonState, 3, &old.flags(), Some(tls)).await;
    let new = Certificates::new();
    new.client("anne");
    let get = |url: &str, certificates: &Certificates| {
        certificates
            .etcdctl(url, Some("anne"), &["get", "key"])
            .status
            .success()
    };
    let url = cluster.client_url(1).to_owned();
    assert!(get(&url, &old) && !get(&url, &new));

    let place = |name: &str| old.folder.path().join(name);
    let key = fs::read(place("server.key")).unwrap();
    fs::write(place("server.key"), "nonsense").unwrap();
    assert!(get(&url, &old), "half of a change is used");
    fs::write(place("server.key"), key).unwrap();
    for name in ["ca.pem", "server.pem", "server.key"] {
        fs::copy(new.folder.path().join(name), place(name)).unwrap();
    }
    assert!(get(&url, &new) && !get(&url, &new_strangers()));
    // A member that comes back is talked to with the new ones.
    cluster.kill(2);
    cluster.run(2);
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !get(cluster.client_url(2), &new) {
        assert!(std::time::Instant::now() < limit, "{}", cluster.log_of(2));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// What an agent's `state` URL says of certificates holds, with keelson-state and with etcd.
#[tokio::test]
async fn an_agents_store_is_reached_with_certificates() {
    // etcd's members want to see each other's addresses in certificates, which loopback does not show them.
    for (program, members, scheme) in [
        (Program::KeelsonState, 3, "cluster"),
        (Program::Etcd, 1, "etcd"),
    ] {
        let certificates = Certificates::new();
        let tls = certificates.client("anne");
        let flags = certificates.flags();
        let cluster = Cluster::start_with(program, members, &flags, Some(tls)).await;
        let urls: Vec<_> = (0..members).map(|at| cluster.client_url(at)).collect();
        let location = format!("{scheme}:{}?timeout_ms=2000", urls.join(","));
        let open = |ca: &Path, name: Option<&str>| {
            let identity = name.map(|name| certificates.path(name)).map(|certificate| {
                let key = certificate.with_extension("key");
                format!(
                    "&cert_file={}&key_file={}",
                    certificate.display(),
                    key.display()
                )
            });
            let url = format!(
                "{location}&ca_file={}{}",
                ca.display(),
                identity.unwrap_or_default()
            );
            async move { keelson_controlplane::open(&url).await }
        };
        let ca = certificates.path("ca");
        let store = open(&ca, Some("anne")).await.unwrap();
        let watched = WatchRequest::prefix("tls/").from_revision(1);
        let mut changes = store.watch(watched).await.unwrap();
        store
            .put(PutRequest::new("tls/key", "value"))
            .await
            .unwrap();
        let found = store.get(b"tls/key").await.unwrap().unwrap();
        assert_eq!(found.value, "value", "{scheme}");
        let batch = changes.next().await.unwrap().unwrap();
        assert_eq!(batch.events[0].kv.key, "tls/key", "{scheme}");

        let refused = open(&ca, None).await;
        assert!(refused.is_err(), "{scheme}: without a certificate");
        let other = Certificates::new();
        let refused = open(&other.path("ca"), Some("anne")).await;
        assert!(
            refused.is_err(),
            "{scheme}: a server that nobody vouches for"
        );
        let missing = open(Path::new("/nonexistent/ca.pem"), None).await;
        let missing = missing.unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/ca.pem"), "{missing}");
        let plain = format!(
            "{}&ca_file={}",
            location.replace("https", "http"),
            ca.display()
        );
        let plain = keelson_controlplane::open(&plain).await.unwrap_err();
        assert!(plain.to_string().contains("https://"), "{plain}");
    }
}

/// Signed by nobody that a member knows.
fn new_strangers() -> Certificates {
    let strangers = Certificates::new();
    strangers.client("anne");
    strangers
}

/// The common name of a certificate is a user.
#[tokio::test]
async fn a_certificate_is_a_user() {
    let certificates = Certificates::new();
    let tls = certificates.client("root");
    certificates.client("anne");
    let flags = [certificates.flags(), vec!["--bcrypt-cost", "4"]].concat();
    let cluster = Cluster::start_with(Program::KeelsonState, 1, &flags, Some(tls)).await;
    let mut auth = AuthClient::new(cluster.connect(0).await);
    for name in ["root", "anne"] {
        let add = pb::AuthUserAddRequest {
            name: name.into(),
            password: "password".into(),
            ..pb::AuthUserAddRequest::default()
        };
        auth.user_add(add).await.unwrap();
    }
    let grant = pb::AuthUserGrantRoleRequest {
        user: "root".into(),
        role: "root".into(),
    };
    auth.user_grant_role(grant).await.unwrap();
    auth.auth_enable(pb::AuthEnableRequest {}).await.unwrap();
    let url = cluster.client_url(0);
    let put = ["put", "key", "value"];
    let root = certificates.etcdctl(url, Some("root"), &put);
    assert!(root.status.success(), "{root:?}");
    let anne = certificates.etcdctl(url, Some("anne"), &put);
    assert!(
        String::from_utf8_lossy(&anne.stderr).contains("permission denied"),
        "{anne:?}"
    );
}

/// A CA, and what it signed, in a folder.
struct Certificates {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    paths: Vec<String>,
}

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "tests");
        let ca = params.self_signed(&key).unwrap();
        fs::write(folder.path().join("ca.pem"), ca.pem()).unwrap();
        let certificates = Self {
            paths: ["ca.pem", "server.pem", "server.key"]
                .map(|name| folder.path().join(name).to_str().unwrap().to_owned())
                .into(),
            folder,
            issuer: Issuer::new(params, key),
        };
        certificates.sign("server");
        certificates
    }

    /// Signs a certificate for this process's address; how a client uses it.
    fn client(&self, name: &str) -> ClientTlsConfig {
        self.sign(name);
        let read = |path: &Path| fs::read(path).unwrap();
        let (certificate, key) = (self.path(name), self.path(name).with_extension("key"));
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&self.path("ca"))))
            .identity(Identity::from_pem(read(&certificate), read(&key)))
    }

    fn sign(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::IpAddress(address().into())];
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(name), certificate.pem()).unwrap();
        fs::write(self.path(name).with_extension("key"), key.serialize_pem()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.pem"))
    }

    /// Flags of a member.
    fn flags(&self) -> Vec<&str> {
        let (ca, certificate, key) = (&*self.paths[0], &*self.paths[1], &*self.paths[2]);
        vec![
            "--cert-file",
            certificate,
            "--key-file",
            key,
            "--client-cert-auth",
            "--trusted-ca-file",
            ca,
            "--peer-cert-file",
            certificate,
            "--peer-key-file",
            key,
            "--peer-client-cert-auth",
            "--peer-trusted-ca-file",
            ca,
        ]
    }

    fn etcdctl(&self, url: &str, name: Option<&str>, arguments: &[&str]) -> Output {
        let certificate = name.map(|name| self.path(name));
        self.etcdctl_with(url, certificate.as_deref(), arguments)
    }

    fn etcdctl_with(&self, url: &str, certificate: Option<&Path>, arguments: &[&str]) -> Output {
        let mut command = Command::new(etcdctl());
        command
            .args(["--endpoints", url, "--cacert"])
            .arg(self.path("ca"))
            .args(["--command-timeout", "2s"]);
        if let Some(certificate) = certificate {
            command
                .arg("--cert")
                .arg(certificate)
                .arg("--key")
                .arg(certificate.with_extension("key"));
        }
        command.args(arguments).output().unwrap()
    }
}

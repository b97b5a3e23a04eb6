//! Certificate files that are missing, wrong, or change.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use keelson_tls::{TlsError, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use tempfile::TempDir;

/// A folder with a CA's certificate that is the own one as well.
fn files() -> (TempDir, TlsFiles) {
    let folder = tempfile::tempdir().expect("there is a place for temporary files");
    write_pair(&folder);
    let path = |name: &str| Some(folder.path().join(name));
    let files = TlsFiles {
        certificate: path("cert.pem"),
        key: path("key.pem"),
        client_auth: true,
        trusted_ca: path("cert.pem"),
        protocols: &[b"keelson"],
    };
    (folder, files)
}

fn write_pair(folder: &TempDir) {
    let key = KeyPair::generate().expect("generated");
    let mut params = CertificateParams::new(Vec::new()).expect("valid");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).expect("signed");
    fs::write(folder.path().join("cert.pem"), certificate.pem()).expect("written");
    fs::write(folder.path().join("key.pem"), key.serialize_pem()).expect("written");
}

fn refused(files: &TlsFiles) -> [TlsError; 2] {
    let server = files.server().map(drop);
    let client = files.client().map(drop);
    [server.expect_err("a server"), client.expect_err("a client")]
}

#[test]
fn what_is_missing_or_wrong_is_said() {
    let (folder, whole) = files();
    whole.server().expect("usable").expect("there is one");
    whole.client().expect("usable");
    let without_key = TlsFiles {
        key: None,
        ..whole.clone()
    };
    assert!(
        refused(&without_key)
            .iter()
            .all(|error| matches!(error, TlsError::Pair))
    );
    let without_ca = TlsFiles {
        trusted_ca: None,
        ..whole.clone()
    };
    for error in refused(&without_ca) {
        assert!(matches!(error, TlsError::NoTrustedCa), "{error}");
    }
    let place = |name: &str| -> Option<PathBuf> { Some(folder.path().join(name)) };
    let swapped = TlsFiles {
        certificate: place("key.pem"),
        key: place("cert.pem"),
        ..whole.clone()
    };
    for error in refused(&swapped) {
        assert!(
            error.to_string().contains("key.pem holds no certificate"),
            "{error}"
        );
    }
    let absent = TlsFiles {
        trusted_ca: place("absent.pem"),
        ..whole
    };
    for error in refused(&absent) {
        assert!(error.to_string().contains("cannot read"), "{error}");
    }
    assert!(
        TlsFiles::default()
            .server()
            .expect("nothing is asked for")
            .is_none()
    );
}

#[test]
fn files_that_change_are_read_again_unless_they_make_no_sense() {
    let (folder, files) = files();
    let tls = files.server().expect("usable").expect("there is one");
    let first = tls.config();
    assert!(Arc::ptr_eq(&first, &tls.config()));
    let key = fs::read(folder.path().join("key.pem")).expect("read");
    fs::write(folder.path().join("key.pem"), "nonsense").expect("written");
    assert!(Arc::ptr_eq(&first, &tls.config()));
    fs::write(folder.path().join("key.pem"), key).expect("written");
    write_pair(&folder);
    assert!(!Arc::ptr_eq(&first, &tls.config()));
}

//! Where the programs under test are.

use std::path::{Path, PathBuf};

/// The payload guest's image, which this crate's build script has built.
pub fn payload() -> &'static Path {
    Path::new(env!("KEELSON_PAYLOAD"))
}

/// A program of this workspace, built in the same profile as the running test.
///
/// # Panics
/// If it isn't there.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    if let Some(sibling) = test.parent().map(|folder| folder.join(name))
        && sibling.is_file()
    {
        return sibling;
    }
    // target/<profile>/deps/<test>
    let profile = test
        .ancestors()
        .nth(2)
        .expect("a test is in target/<profile>/deps");
    let path = profile.join(name);
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build -p keelson-vmm -p keelson-blk` in the same profile first",
        path.display()
    );
    path
}

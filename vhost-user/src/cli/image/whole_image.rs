//! The digest of a whole image, as its publisher gives it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use clap::Args;
use keelson_blk::Error;
use keelson_blk::remote::manifest::hex;
use sha2::{Digest, Sha256, Sha512};

/// What the whole image has to be.
#[derive(Debug, Args)]
pub struct WholeImage {
    /// The SHA-256 of the whole image, as its publisher's SHA256SUMS has it
    #[arg(long, value_name = "HEX", value_parser = sha256)]
    sha256: Option<String>,
    /// The SHA-512 of the whole image, as its publisher's SHA512SUMS has it
    #[arg(long, value_name = "HEX", value_parser = sha512)]
    sha512: Option<String>,
}

fn sha256(text: &str) -> Result<String, String> {
    digits(text, 64)
}

fn sha512(text: &str) -> Result<String, String> {
    digits(text, 128)
}

fn digits(text: &str, count: usize) -> Result<String, String> {
    if text.len() != count || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("not {count} hexadecimal digits"));
    }
    Ok(text.to_ascii_lowercase())
}

impl WholeImage {
    /// Whether a digest was given.
    pub fn is_given(&self) -> bool {
        self.sha256.is_some() || self.sha512.is_some()
    }

    /// Takes the image's bytes in order.
    pub fn hasher(&self) -> ImageHasher<'_> {
        let (sha256, sha512) = (self.sha256.as_deref(), self.sha512.as_deref());
        ImageHasher {
            sha256: sha256.map(|expected| (Sha256::new(), expected)),
            sha512: sha512.map(|expected| (Sha512::new(), expected)),
        }
    }

    /// Checks a file, if a digest was given, and goes back to its start.
    ///
    /// # Errors
    /// [`Error::WrongDigest`], or what the kernel says. `progress` is told how many bytes are done.
    pub fn check_file(
        &self,
        file: &mut File,
        path: &Path,
        mut progress: impl FnMut(u64),
    ) -> Result<(), Error> {
        if !self.is_given() {
            return Ok(());
        }
        let failed = |source| Error::OpenImage {
            path: path.into(),
            source,
        };
        let mut hasher = self.hasher();
        let mut buffer = vec![0; 1 << 20];
        let mut done = 0;
        loop {
            let len = match file.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(failed)?,
            };
            if len == 0 {
                break;
            }
            hasher.update(buffer.get(..len).unwrap_or_default());
            done += len as u64;
            progress(done);
        }
        file.rewind().map_err(failed)?;
        hasher.check(path)
    }
}

/// The digests of what it was given so far.
pub struct ImageHasher<'a> {
    sha256: Option<(Sha256, &'a str)>,
    sha512: Option<(Sha512, &'a str)>,
}

impl ImageHasher<'_> {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        if let Some((hasher, _)) = &mut self.sha256 {
            hasher.update(bytes);
        }
        if let Some((hasher, _)) = &mut self.sha512 {
            hasher.update(bytes);
        }
    }

    /// Compares what came with what was expected.
    ///
    /// # Errors
    /// [`Error::WrongDigest`].
    pub fn check(self, path: &Path) -> Result<(), Error> {
        let sha256 = self.sha256;
        let sha256 =
            sha256.map(|(hasher, expected)| ("SHA-256", hex(&hasher.finalize()), expected));
        let sha512 = self.sha512;
        let sha512 =
            sha512.map(|(hasher, expected)| ("SHA-512", hex(&hasher.finalize()), expected));
        for (digest, found, expected) in sha256.into_iter().chain(sha512) {
            if found != expected {
                return Err(Error::WrongDigest {
                    path: path.into(),
                    digest,
                    found,
                    expected: expected.into(),
                });
            }
        }
        Ok(())
    }
}

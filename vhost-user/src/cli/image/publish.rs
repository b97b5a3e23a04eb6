//! `keelson-blk image manifest`

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

use clap::Args;
use keelson_blk::Error;
use keelson_blk::remote::{self, Manifest};

use super::whole_image::ImageHasher;
use super::{WholeImage, progress_bar, say, size};

/// The arguments of `image manifest`.
#[derive(Debug, Args)]
pub struct MakeManifest {
    /// The raw image
    path: PathBuf,
    #[command(flatten)]
    whole: WholeImage,
    /// What is fetched and verified at once: 64K to 4M
    #[arg(long, value_parser = size::parse, default_value = "256K")]
    chunk: u64,
}

/// Writes the checksums of an image.
pub fn make_manifest(arguments: &MakeManifest) -> Result<(), Error> {
    let failed = |source| Error::OpenImage {
        path: arguments.path.clone(),
        source,
    };
    let mut image = File::open(&arguments.path).map_err(failed)?;
    if !arguments.chunk.is_power_of_two()
        || !remote::manifest::CHUNK_BYTES.contains(&arguments.chunk)
    {
        return Err(failed(io::Error::other(
            "--chunk takes a power of two from 64K to 4M",
        )));
    }
    let bar = progress_bar();
    bar.set_length(image.seek(SeekFrom::End(0)).map_err(failed)?);
    image.rewind().map_err(failed)?;
    let mut image = Hashed {
        image,
        hasher: arguments.whole.hasher(),
    };
    let manifest = Manifest::of(&mut image, arguments.chunk, |done| bar.set_position(done));
    bar.finish_and_clear();
    let text = manifest.map_err(failed)?.to_text();
    image.hasher.check(&arguments.path)?;
    let mut target = arguments.path.clone().into_os_string();
    target.push(remote::manifest::SUFFIX);
    let target = PathBuf::from(target);
    fs::write(&target, &text).map_err(|source| Error::Io {
        action: format!("can't write {}", target.display()),
        source,
    })?;
    let digest = remote::manifest::hex(&remote::manifest::digest(text.as_bytes()));
    say(&format!("{} created\n  SHA-256 {digest}", target.display()))
}

/// An image whose digests are taken as it is read, so that they are of the bytes that the manifest
/// is of.
struct Hashed<'a> {
    image: File,
    hasher: ImageHasher<'a>,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.image.read(buffer)?;
        self.hasher.update(buffer.get(..len).unwrap_or_default());
        Ok(len)
    }
}

//! Images on servers as bases of overlays on this host.
//!
//! An overlay's header pins the image: its size, and the digest of its manifest or of the server's
//! validator. The manifest itself is kept beside the overlay, under its own digest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::client::Description;
use super::manifest::{DEFAULT_CHUNK, digest as digest_of, hex};
use super::{FetchOptions, Fetcher, HttpImage, Manifest, RemoteError};
use crate::Error;
use crate::overlay::chain::Source;
use crate::overlay::files::{self, NewBase, OpenOptions, OpenOverlay, change_base};
use crate::overlay::header::Base;
use crate::overlay::{OverlayError, StripedFile};

/// How much an image's server is trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksums {
    /// There has to be a manifest beside the image.
    #[default]
    Manifest,
    /// There has to be one of this digest, which came another way than the image.
    Pinned([u8; 32]),
    /// None: what comes is taken, as long as the server says that it is the same image.
    None,
}

/// Whether a base's name is an address.
pub fn is_url(name: &str) -> bool {
    name.starts_with("https://") || name.starts_with("http://")
}

/// Asks a server for an image that overlays are to be made of. The manifest is kept in `folder`,
/// where the overlay will be.
pub fn describe(
    url: &str,
    checksums: Checksums,
    options: &FetchOptions,
    folder: &Path,
) -> Result<NewBase, RemoteError> {
    let image = HttpImage::new(url, &options.client)?;
    let found = image.describe()?;
    let mut base = Base::Http {
        url: url.into(),
        bytes: found.bytes,
        manifest: None,
        validator: found.validator,
    };
    if checksums == Checksums::None {
        if found.validator.is_none() {
            return Err(RemoteError::NoValidator { url: url.into() });
        }
        let chunk_bytes = DEFAULT_CHUNK;
        return Ok(NewBase::Http { base, chunk_bytes });
    }
    let text = image.manifest()?;
    let text = text.ok_or_else(|| RemoteError::NoManifest {
        url: image.manifest_url(),
    })?;
    let digest = digest_of(&text);
    let refuse = |reason: String| RemoteError::Manifest {
        name: image.manifest_url(),
        reason,
    };
    if let Checksums::Pinned(pinned) = checksums
        && pinned != digest
    {
        let (found, pinned) = (hex(&digest), hex(&pinned));
        return Err(refuse(format!("its SHA-256 is {found}, not {pinned}")));
    }
    let parsed = Manifest::parse(&text).map_err(refuse)?;
    if parsed.bytes() != found.bytes {
        let (says, has) = (parsed.bytes(), found.bytes);
        return Err(refuse(format!(
            "it is of an image of {says} bytes, and the one beside it has {has}"
        )));
    }
    keep(folder, &digest, &text)?;
    if let Base::Http {
        manifest,
        validator,
        ..
    } = &mut base
    {
        *manifest = Some(digest);
        *validator = None;
    }
    let chunk_bytes = parsed.chunk_bytes();
    Ok(NewBase::Http { base, chunk_bytes })
}

/// Opens an overlay, whose base may be on a server: see [`files::open`].
pub fn open_overlay(
    path: &Path,
    options: &OpenOptions,
    fetch: &FetchOptions,
) -> Result<OpenOverlay, Error> {
    files::open(
        path,
        options,
        Some(&|lowest, base| open(lowest, base, fetch)),
    )
}

// Opens the base of the lowest layer. Asks the server for nothing but a manifest that isn't here.
fn open(
    lowest: &StripedFile,
    base: &Base,
    options: &FetchOptions,
) -> Result<Arc<dyn Source>, Error> {
    let Base::Http {
        url,
        bytes,
        manifest,
        validator,
    } = base
    else {
        return Err(Error::io(
            "not a base on a server",
            io::ErrorKind::InvalidInput,
        ));
    };
    let image = HttpImage::new(url, &options.client)?;
    let folder = folder_of(lowest.path());
    let manifest = manifest
        .map(|digest| find(&image, &folder, &digest))
        .transpose()?;
    let expected = Description {
        bytes: *bytes,
        validator: *validator,
    };
    if manifest
        .as_ref()
        .is_some_and(|manifest| manifest.bytes() != *bytes)
    {
        return Err(RemoteError::Manifest {
            name: image.manifest_url(),
            reason: format!("it is not of an image of {bytes} bytes"),
        }
        .into());
    }
    let fetcher = Fetcher::new(image, expected, manifest, options)
        .map_err(|error| Error::io("can't start to fetch", error))?;
    if !fetcher.chunk_bytes().is_multiple_of(lowest.stripe_bytes()) {
        return Err(RemoteError::Manifest {
            name: url.clone(),
            reason: "its chunks are smaller than the overlay's stripes".into(),
        }
        .into());
    }
    Ok(Arc::new(fetcher))
}

/// Says that an overlay's base is at another address, after it was recognized there: by its
/// manifest, or, without one, by its size and the server's validator.
pub fn rebase(path: &Path, url: &str, options: &FetchOptions) -> Result<(), Error> {
    change_base(path, |base| {
        let Base::Http {
            bytes,
            manifest,
            validator,
            ..
        } = base
        else {
            let reason = "its base is on no server".into();
            let path = path.into();
            return Err(OverlayError::Refused { path, reason }.into());
        };
        let checksums = manifest.map_or(Checksums::None, Checksums::Pinned);
        let described = describe(url, checksums, options, &folder_of(path))?;
        let NewBase::Http { base: found, .. } = described else {
            return Err(Error::io(
                "not a base on a server",
                io::ErrorKind::InvalidInput,
            ));
        };
        match &found {
            Base::Http {
                bytes: has,
                validator: says,
                ..
            } if has == bytes && says == validator => Ok(found),
            _ => Err(RemoteError::Changed {
                url: url.into(),
                reason: "its size, ETag or Last-Modified is another".into(),
            }
            .into()),
        }
    })
}

/// The folder that a file is in.
pub fn folder_of(path: &Path) -> PathBuf {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).into()
}

// The manifest of this digest: the one that was kept, else the server's.
fn find(image: &HttpImage, folder: &Path, digest: &[u8; 32]) -> Result<Manifest, RemoteError> {
    let refuse = |reason: String| RemoteError::Manifest {
        name: image.manifest_url(),
        reason,
    };
    let kept = fs::read(place(folder, digest)).ok();
    let whole = |text: &Vec<u8>| digest_of(text) == *digest;
    let text = if let Some(text) = kept.filter(whole) {
        text
    } else {
        let text = image.manifest()?;
        let text = text.ok_or_else(|| RemoteError::NoManifest {
            url: image.manifest_url(),
        })?;
        if !whole(&text) {
            return Err(RemoteError::Changed {
                url: image.url().into(),
                reason: "its manifest is another".into(),
            });
        }
        if let Err(error) = keep(folder, digest, &text) {
            tracing::warn!(%error, "the manifest will have to be fetched again");
        }
        text
    };
    Manifest::parse(&text).map_err(refuse)
}

// Checked when it is read, so an interrupted copy is only fetched again.
fn keep(folder: &Path, digest: &[u8; 32], text: &[u8]) -> Result<(), RemoteError> {
    let path = place(folder, digest);
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
    written.map_err(|error| RemoteError::Local {
        action: "keep the manifest in",
        path,
        reason: error.to_string(),
    })
}

fn place(folder: &Path, digest: &[u8; 32]) -> PathBuf {
    let name = hex(digest.get(..16).unwrap_or_default());
    folder.join(format!(".{name}.manifest"))
}

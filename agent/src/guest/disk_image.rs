//! The image of a disk, before it is served: created where it is to be, made as large as it is to
//! be, and its key.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use keelson_api::{DiskBase, DiskFormat, DiskSpec};
use keelson_blk::image::DirectMode;
use keelson_blk::overlay::files::{self, CreateOptions, Format, NewBase};
use keelson_blk::remote::files::Checksums;
use keelson_blk::remote::manifest::decode;
use keelson_blk::remote::{self, FetchOptions};
use keelson_blk::sector_cipher::SectorCipher;

use crate::{AgentError, error::Result};

/// Creates the disk's image if it is an overlay that isn't there yet, and makes it larger if it is
/// to be.
///
/// # Errors
/// [`AgentError::Process`] with the reason `DiskUnusable`.
pub async fn prepare(spec: &DiskSpec) -> Result<()> {
    let spec = spec.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare_blocking(&spec)).await;
    prepared.map_err(|error| unusable(error.to_string()))?
}

/// The open key file of an encrypted disk.
///
/// # Errors
/// [`AgentError::Io`] with the file's name.
pub fn key(spec: &DiskSpec) -> Result<Option<Arc<OwnedFd>>> {
    let Some(encryption) = &spec.encryption else {
        return Ok(None);
    };
    let what = format!("open the key file {}", encryption.key_file.display());
    let file = File::open(&encryption.key_file).map_err(AgentError::io(what))?;
    Ok(Some(Arc::new(file.into())))
}

fn prepare_blocking(spec: &DiskSpec) -> Result<()> {
    if let Some(base) = spec.base.as_ref().filter(|_| !spec.path.exists()) {
        files::create(&CreateOptions {
            path: spec.path.clone(),
            base: new_base(spec, base)?,
            bytes: None,
            stripe_bytes: None,
            cipher: cipher(spec)?,
        })
        .map_err(|error| unusable(error.to_string()))?;
    }
    match spec.size {
        Some(size) if !spec.read_only => grow(spec, size.bytes()),
        _ => Ok(()),
    }
}

fn new_base(spec: &DiskSpec, base: &DiskBase) -> Result<NewBase> {
    let format = match base.format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Overlay => Format::Overlay,
    };
    let Some(url) = &base.url else {
        let path = base.path.clone().unwrap_or_default();
        return Ok(NewBase::Image(path, format));
    };
    let pinned = base.manifest_sha256.as_deref().and_then(decode);
    let checksums = match pinned {
        Some(digest) => Checksums::Pinned(digest),
        None if base.without_checksums => Checksums::None,
        None => Checksums::Manifest,
    };
    let mut options = FetchOptions::default();
    options.client.ca_file.clone_from(&base.ca_file);
    let folder = remote::files::folder_of(&spec.path);
    let described = remote::files::describe(url, checksums, &options, &folder);
    described.map_err(|error| unusable(error.to_string()))
}

fn grow(spec: &DiskSpec, bytes: u64) -> Result<()> {
    let path = &spec.path;
    if spec.is_overlay() {
        let options = files::OpenOptions {
            read_only: false,
            direct: DirectMode::Off,
            cipher: cipher(spec)?,
        };
        let opened = files::open_layer(path, &options, true);
        let (_image, layer) = opened.map_err(|error| unusable(error.to_string()))?;
        // One that has grown beyond is as large as it is.
        if layer.bytes() < bytes {
            let grown = layer.grow(bytes);
            return grown.map_err(|error| unusable(error.to_string()));
        }
        return Ok(());
    }
    let what = || format!("make {} {bytes} bytes large", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(AgentError::io(what()))?;
    let has = file
        .seek(SeekFrom::End(0))
        .map_err(AgentError::io(what()))?;
    if has < bytes {
        // A block device that is too small says no.
        file.set_len(bytes).map_err(AgentError::io(what()))?;
    }
    Ok(())
}

/// The cipher of an encrypted disk.
///
/// # Errors
/// [`AgentError::Io`] or [`AgentError::Process`] if the key file can't be used.
pub fn cipher(spec: &DiskSpec) -> Result<Option<Arc<SectorCipher>>> {
    let Some(key) = key(spec)? else {
        return Ok(None);
    };
    let what = || "read the key file".to_owned();
    let key = key.try_clone().map_err(AgentError::io(what()))?;
    let cipher = SectorCipher::read_key(key.into()).map_err(|error| unusable(error.to_string()))?;
    Ok(Some(Arc::new(cipher)))
}

fn unusable(message: String) -> AgentError {
    AgentError::Process {
        reason: "DiskUnusable",
        message,
    }
}

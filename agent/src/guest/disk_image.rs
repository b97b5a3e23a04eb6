//! The image of a disk, before it is served: created where it is to be, made as large as it is to
//! be, and its key.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use keelson_api::{DiskFormat, DiskSpec};
use keelson_blk::image::DirectMode;
use keelson_blk::overlay::files::{self, CreateOptions, Format, NewBase};
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
        let format = match base.format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Overlay => Format::Overlay,
        };
        files::create(&CreateOptions {
            path: spec.path.clone(),
            base: NewBase::Image(base.path.clone(), format),
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

fn cipher(spec: &DiskSpec) -> Result<Option<Arc<SectorCipher>>> {
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

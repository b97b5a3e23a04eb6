//! Snapshots: a new layer on what a disk holds, under the disk's name.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::files::{MAX_LAYERS, OpenOptions, OpenOverlay, open_layer, sync_folder, write_new};
use super::header::{Base, Header};
use super::{Chain, OverlayError, StripedFile};
use crate::Error;
use crate::image::DirectMode;
use crate::sector_cipher::SectorCipher;

/// Makes what the disk holds now a snapshot beside it, named `PATH.NAME`, and goes on in a new,
/// empty layer on it under the old name. The disk is not open elsewhere.
///
/// Interrupted at any point, the disk is there under its name, with or without the new layer;
/// asking again with the same name finishes it.
pub fn snapshot(
    path: &Path,
    name: &str,
    cipher: Option<Arc<SectorCipher>>,
) -> Result<PathBuf, Error> {
    let options = OpenOptions {
        cipher,
        direct: DirectMode::Off,
        read_only: false,
    };
    let (_locked, layer) = open_layer(path, &options, true)?;
    layer
        .flush()
        .map_err(|error| OverlayError::io("flush", path, error))?;
    let (snapshot, _) = push_layer(path, name, &layer, options.cipher.as_deref())?;
    layer
        .seal()
        .map_err(|error| OverlayError::io("seal", &snapshot, error))?;
    Ok(snapshot)
}

/// The same for a disk that is open here, and which nobody uses meanwhile. Returns the snapshot's
/// path, and the disk on its new layer.
pub fn snapshot_open(open: &OpenOverlay, name: &str) -> Result<(PathBuf, OpenOverlay), Error> {
    let top = open.chain.top();
    let path = top.path();
    let failed = |action| move |error| OverlayError::io(action, path, error);
    open.chain.flush().map_err(failed("flush"))?;
    if open.chain.layers().len() >= MAX_LAYERS {
        let (path, limit) = (path.into(), MAX_LAYERS);
        return Err(OverlayError::TooDeep { path, limit }.into());
    }
    let (snapshot, _) = push_layer(path, name, top, top.cipher().map(AsRef::as_ref))?;
    let uncached = open
        .images
        .first()
        .is_some_and(|image| image.direct().is_some());
    let options = OpenOptions {
        read_only: false,
        direct: if uncached {
            DirectMode::Auto
        } else {
            DirectMode::Off
        },
        cipher: top.cipher().cloned(),
    };
    let (image, layer) = open_layer(path, &options, true)?;
    top.seal().map_err(failed("seal"))?;
    // Others may stand on it now.
    if let Some(image) = open.images.first() {
        image.share_lock().map_err(failed("unlock"))?;
    }
    let mut layers = vec![Arc::new(layer)];
    layers.extend(open.chain.layers().iter().cloned());
    let mut images = vec![image];
    images.extend(open.images.iter().cloned());
    let chain = Chain::new(layers, open.chain.bottom().clone()).map_err(failed("stack"))?;
    let open = OpenOverlay {
        chain: Arc::new(chain),
        images,
        raw: open.raw.clone(),
        scratch: false,
    };
    Ok((snapshot, open))
}

/// The file system's part of a snapshot of a flushed layer: returns the snapshot's path and the
/// new top's header.
pub fn push_layer(
    path: &Path,
    name: &str,
    layer: &StripedFile,
    cipher: Option<&SectorCipher>,
) -> Result<(PathBuf, Header), Error> {
    let refuse = |reason: String| OverlayError::Refused {
        path: path.into(),
        reason,
    };
    check_name(name).map_err(|reason| refuse(reason.into()))?;
    let snapshot = with_suffix(path, name);
    match (fs::metadata(path), fs::symlink_metadata(&snapshot)) {
        (Ok(disk), Ok(there)) if (disk.dev(), disk.ino()) == (there.dev(), there.ino()) => {
            tracing::info!(snapshot = %snapshot.display(), "finishing a snapshot that was interrupted");
        }
        (_, Ok(_)) => {
            return Err(refuse(format!("there is a {} already", snapshot.display())).into());
        }
        _ => fs::hard_link(path, &snapshot)
            .map_err(|error| OverlayError::io("create", &snapshot, error))?,
    }
    let below = layer.header();
    let header = Header {
        uuid: Uuid::new_v4(),
        generation: 1,
        opened: 0,
        sealed: false,
        key_check: cipher.map(|cipher| cipher.key_check(Uuid::new_v4().into_bytes())),
        base: Base::Striped {
            path: snapshot.file_name().map(PathBuf::from).unwrap_or_default(),
            bytes: below.bytes,
            uuid: below.uuid,
            opened: below.opened,
        },
        ..below
    };
    header.check().map_err(|error| refuse(error.to_string()))?;
    let new = with_suffix(path, "~new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(OverlayError::io("remove", new, error).into());
        }
        _ => {}
    }
    write_new(&new, &header)?;
    fs::rename(&new, path).map_err(|error| OverlayError::io("replace", path, error))?;
    sync_folder(path)?;
    Ok((snapshot, header))
}

/// Says why a snapshot can't have this name.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.contains('/') || name.starts_with('~') || name.len() > 100 {
        return Err("a snapshot's name has 1 to 100 bytes, no slash, and no ~ first");
    }
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(".");
    text.push(suffix);
    text.into()
}

//! Layered images in the file system: create, open, grow, snapshot, rebase.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use uuid::Uuid;

use super::chain::{Bottom, Source};
use super::header::{Base, Header, MAGIC, MAX_REFERENCE, MAX_SIZE, STRIPES_PER_BLOCK};
use super::striped_file::StripedOptions;
use super::{Chain, FileStorage, OverlayError, Storage, StripedFile, base, session};
use crate::Error;
use crate::image::{DirectMode, Image, ImageOptions};
use crate::sector_cipher::SectorCipher;

/// The most layers above a raw base.
pub const MAX_LAYERS: usize = 32;
/// The stripe's size unless another is asked for, in bytes.
pub const DEFAULT_STRIPE: u32 = 64 << 10;
/// Disks up to this size can be reached by growing, in any case.
const ROOM_TO_GROW: u64 = 1 << 40;

/// How an image's bytes are to be understood. It is never guessed from them: a guest writes the
/// first bytes of a raw image, and could make it look like an overlay of any file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, one after the other.
    #[default]
    Raw,
    /// A striped file, perhaps on a base.
    Overlay,
}

/// What a new overlay stands on.
#[derive(Clone, Debug)]
pub enum NewBase {
    /// Nothing: it is zero at first.
    None,
    /// An image.
    Image(PathBuf, Format),
    /// An image on a server, as [`describe`](crate::remote::files::describe) found it.
    Http {
        /// What is pinned of it.
        base: Base,
        /// What is fetched at once, in bytes; stripes are no larger.
        chunk_bytes: u64,
    },
}

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Where. Nothing may be there.
    pub path: PathBuf,
    /// What it stands on.
    pub base: NewBase,
    /// The disk's size in bytes; the base's, if none is given.
    pub bytes: Option<u64>,
    /// The stripe's size in bytes, a power of two from 64 KiB to 1 MiB. Layers on another
    /// overlay have its stripes.
    pub stripe_bytes: Option<u32>,
    /// The key, to encrypt what is written to it.
    pub cipher: Option<Arc<SectorCipher>>,
}

/// How to open.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// Whether to go around the page cache.
    pub direct: DirectMode,
    /// The key of the encrypted layers.
    pub cipher: Option<Arc<SectorCipher>>,
}

/// An open overlay, with the files that its layers are in.
#[derive(Clone, Debug)]
pub struct OpenOverlay {
    /// The disk.
    pub chain: Arc<Chain>,
    /// The layers' files, the top one first.
    pub images: Vec<Arc<Image>>,
    /// The raw base's file.
    pub raw: Option<Arc<Image>>,
    /// The top layer is a file without a name that holds what was fetched, since the disk is only
    /// read.
    pub scratch: bool,
}

/// What fetches a base from its server: given the lowest layer and what it stands on.
pub type OpenSource<'a> = &'a dyn Fn(&Arc<StripedFile>, &Base) -> Result<Arc<dyn Source>, Error>;

/// Creates an overlay, in milliseconds whatever the base's size.
pub fn create(options: &CreateOptions) -> Result<Header, Error> {
    let path = options.path.as_path();
    let refuse = |reason: String| OverlayError::Refused {
        path: path.into(),
        reason,
    };
    let (base, inherited) = describe_base(&options.base)?;
    let stripe_bytes = match (options.stripe_bytes, inherited) {
        (Some(asked), Some(has)) if asked != has => {
            return Err(refuse(format!("its base has stripes of {has} bytes; so must it")).into());
        }
        (asked, inherited) => inherited.or(asked).unwrap_or(DEFAULT_STRIPE),
    };
    if let NewBase::Http { chunk_bytes, .. } = options.base
        && u64::from(stripe_bytes) > chunk_bytes
    {
        let reason =
            format!("its base is fetched in {chunk_bytes} bytes; its stripes can't be larger");
        return Err(refuse(reason).into());
    }
    let bytes = match options.bytes {
        Some(bytes) if bytes < base.bytes() => {
            let has = base.bytes();
            return Err(refuse(format!("{bytes} bytes are fewer than its base's {has}")).into());
        }
        Some(bytes) => bytes,
        None => base.bytes(),
    };
    let bytes = bytes.next_multiple_of(512);
    let room = bytes.saturating_mul(16).clamp(ROOM_TO_GROW, MAX_SIZE);
    let header = Header {
        uuid: Uuid::new_v4(),
        generation: 1,
        opened: 0,
        bytes,
        stripe_bytes,
        map_capacity: room
            .div_ceil(u64::from(stripe_bytes).max(1))
            .div_ceil(STRIPES_PER_BLOCK),
        sealed: false,
        key_check: options
            .cipher
            .as_ref()
            .map(|cipher| cipher.key_check(Uuid::new_v4().into_bytes())),
        base,
    };
    if bytes == 0 {
        return Err(refuse("it has no size; give one with --size".into()).into());
    }
    header.check().map_err(|error| refuse(error.to_string()))?;
    write_new(path, &header)?;
    Ok(header)
}

/// Opens an overlay and everything that it stands on.
pub fn open(
    path: &Path,
    options: &OpenOptions,
    open_source: Option<OpenSource<'_>>,
) -> Result<OpenOverlay, Error> {
    let mut images = Vec::new();
    let mut layers: Vec<Arc<StripedFile>> = Vec::new();
    let mut path = path.to_owned();
    let mut scratch = false;
    loop {
        let first = layers.is_empty();
        let (image, layer) = open_layer(&path, options, first)?;
        if let Some(above) = layers.last() {
            check_striped(above, &layer)?;
        }
        let base = layer.header().base;
        images.push(image);
        layers.push(Arc::new(layer));
        if layers.len() > MAX_LAYERS {
            let limit = MAX_LAYERS;
            return Err(OverlayError::TooDeep { path, limit }.into());
        }
        let (bottom, raw) = match base {
            Base::Striped { path: base, .. } => {
                path = beside(&path, &base);
                continue;
            }
            Base::None => (Bottom::Zero, None),
            Base::Raw { .. } => {
                let image = open_raw(&path, &base, options.direct)?;
                let storage = FileStorage(clone_file(&image, &path)?);
                let bottom = Bottom::Raw(Arc::new(storage), image.bytes());
                (bottom, Some(Arc::new(image)))
            }
            Base::Http { bytes, .. } => {
                scratch = options.read_only;
                let lowest = layers.last().ok_or(io::ErrorKind::NotFound);
                let lowest = lowest.map_err(|error| Error::io("no layer", error))?;
                let refuse = || OverlayError::Refused {
                    path: path.clone(),
                    reason: "its base is on a server, which can't be asked here".into(),
                };
                let open_source = open_source.ok_or_else(refuse)?;
                let source = open_source(lowest, &base)?;
                if let Some(top) = layers.first().filter(|_| scratch) {
                    let (image, layer) = open_scratch(top, options.direct)?;
                    images.insert(0, image);
                    layers.insert(0, Arc::new(layer));
                }
                (Bottom::Source(source, bytes), None)
            }
        };
        let chain = Chain::new(layers, bottom)
            .map_err(|error| OverlayError::io("stack the layers of", &path, error))?;
        return Ok(OpenOverlay {
            chain: Arc::new(chain),
            images,
            raw,
            scratch,
        });
    }
}

/// Says that a raw base is at another path, or has another time of change, after its size and
/// content were compared with what was recorded.
pub fn rebase(path: &Path, new_base: &Path) -> Result<(), Error> {
    let new_base =
        fs::canonicalize(new_base).map_err(|error| OverlayError::io("find", new_base, error))?;
    change_base(path, |base| {
        let Base::Raw { modified, .. } = base else {
            let reason = "its base is no raw image".into();
            let path = path.into();
            return Err(OverlayError::Refused { path, reason }.into());
        };
        let raw = open_image(&new_base, true, DirectMode::Off)?;
        let found = base::identify(&new_base, raw.file(), raw.bytes())
            .map_err(|error| OverlayError::io("read", &new_base, error))?;
        if let Base::Raw { modified: now, .. } = &found {
            *modified = *now;
        }
        base::check(path, base, &found)?;
        Ok(found)
    })
}

/// Records another base of an overlay that nobody uses, if `find` has one that holds the same.
pub fn change_base(
    path: &Path,
    find: impl FnOnce(&mut Base) -> Result<Base, Error>,
) -> Result<(), Error> {
    let image = open_image(path, false, DirectMode::Off)?;
    let storage = FileStorage(clone_file(&image, path)?);
    let mut header = StripedFile::read_header(&storage, path)?;
    header.base = find(&mut header.base)?;
    header.generation += 1;
    header.check().map_err(|error| OverlayError::Refused {
        path: path.into(),
        reason: error.to_string(),
    })?;
    let first = header.generation % 2 * 4096;
    for offset in [first, 4096 - first] {
        storage
            .write_at(&header.to_bytes(), offset)
            .and_then(|()| storage.sync())
            .map_err(|error| OverlayError::io("write the header of", path, error))?;
    }
    Ok(())
}

/// Opens one striped file, locked: exclusively if it is the top one and writable.
pub fn open_layer(
    path: &Path,
    options: &OpenOptions,
    top: bool,
) -> Result<(Arc<Image>, StripedFile), Error> {
    let read_only = options.read_only || !top;
    let image = open_image(path, read_only, options.direct)?;
    let storage = Arc::new(FileStorage(clone_file(&image, path)?));
    let header = StripedFile::read_header(storage.as_ref(), path)?;
    let inode = storage
        .0
        .metadata()
        .map(|metadata| (metadata.dev(), metadata.ino()))
        .map_err(|error| OverlayError::io("examine", path, error))?;
    let layer = StripedFile::open(
        storage,
        path,
        StripedOptions {
            read_only,
            uncached: image.direct().is_some(),
            session: session::folder().map(|folder| (folder, inode)),
            // Layers below may be in the clear: a stock image that others made layers of.
            cipher: options
                .cipher
                .clone()
                .filter(|_| top || header.key_check.is_some()),
        },
    )?;
    Ok((Arc::new(image), layer))
}

// A layer in a file without a name, beside the one that it is put on.
fn open_scratch(top: &StripedFile, direct: DirectMode) -> Result<(Arc<Image>, StripedFile), Error> {
    use std::os::fd::AsRawFd;
    let path = top.path();
    let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let failed = |error| OverlayError::io("make a temporary file in", folder, error);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR);
    let file = file.map_err(|error| failed(error.into()))?;
    let below = top.header();
    let header = Header {
        uuid: Uuid::new_v4(),
        generation: 1,
        opened: 0,
        sealed: false,
        key_check: None,
        base: Base::None,
        map_capacity: below.map_blocks(),
        ..below
    };
    let place = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    // Open until the image is: nothing else keeps the file.
    let file = FileStorage(file.into());
    StripedFile::format(&file, &header).map_err(failed)?;
    let image = open_image(&place, false, direct)?;
    let storage = Arc::new(FileStorage(clone_file(&image, &place)?));
    let options = StripedOptions {
        uncached: image.direct().is_some(),
        ..StripedOptions::default()
    };
    Ok((Arc::new(image), StripedFile::open(storage, path, options)?))
}

fn describe_base(base: &NewBase) -> Result<(Base, Option<u32>), Error> {
    match base {
        NewBase::None => Ok((Base::None, None)),
        NewBase::Http { base, .. } => Ok((base.clone(), None)),
        NewBase::Image(path, format) => {
            // Absolute, so that it is found wherever the overlay is used from.
            let path = fs::canonicalize(path)
                .map_err(|error| OverlayError::io("find the base", path, error))?;
            if path.as_os_str().len() > MAX_REFERENCE {
                let reason = format!("a base's path has at most {MAX_REFERENCE} bytes");
                return Err(OverlayError::Refused { path, reason }.into());
            }
            let image = open_image(&path, true, DirectMode::Off)?;
            let storage = FileStorage(clone_file(&image, &path)?);
            if *format == Format::Overlay {
                let header = StripedFile::read_header(&storage, &path)?;
                let base = Base::Striped {
                    path,
                    bytes: header.bytes,
                    uuid: header.uuid,
                    opened: header.opened,
                };
                return Ok((base, Some(header.stripe_bytes)));
            }
            let mut start = [0; MAGIC.len()];
            storage
                .read_at(&mut start, 0)
                .map_err(|error| OverlayError::io("read", &path, error))?;
            if start == MAGIC {
                let reason = "it looks like an overlay. If you trust who wrote it, give it as one \
                              with --base-format overlay"
                    .into();
                return Err(OverlayError::Refused { path, reason }.into());
            }
            let base = base::identify(&path, image.file(), image.bytes())
                .map_err(|error| OverlayError::io("read", &path, error))?;
            Ok((base, None))
        }
    }
}

fn check_striped(above: &StripedFile, below: &StripedFile) -> Result<(), OverlayError> {
    let Base::Striped {
        path,
        bytes,
        uuid,
        opened,
    } = above.header().base
    else {
        return Ok(());
    };
    let header = below.header();
    let reason = if header.uuid != uuid {
        format!("it is another image ({}, not {uuid})", header.uuid)
    } else if header.opened != opened || header.bytes != bytes {
        "it was opened for writing".into()
    } else {
        return Ok(());
    };
    Err(OverlayError::BaseChanged {
        path: above.path().into(),
        base: path,
        reason,
    })
}

fn open_raw(overlay: &Path, recorded: &Base, direct: DirectMode) -> Result<Image, Error> {
    let Base::Raw { path, .. } = recorded else {
        return Err(Error::io("not a raw base", io::ErrorKind::InvalidInput));
    };
    let path = beside(overlay, path);
    let image = open_image(&path, true, direct)?;
    let cached = File::open(&path).map_err(|error| OverlayError::io("open", &path, error))?;
    let found = base::identify(&path, &cached, image.bytes())
        .map_err(|error| OverlayError::io("read", &path, error))?;
    base::check(overlay, recorded, &found)?;
    Ok(image)
}

fn open_image(path: &Path, read_only: bool, direct: DirectMode) -> Result<Image, Error> {
    Image::open(&ImageOptions {
        path: path.into(),
        read_only,
        direct,
    })
}

fn clone_file(image: &Image, path: &Path) -> Result<File, OverlayError> {
    image
        .file()
        .try_clone()
        .map_err(|error| OverlayError::io("open", path, error))
}

/// A new, empty striped file.
pub(super) fn write_new(path: &Path, header: &Header) -> Result<(), Error> {
    let failed = |error| OverlayError::io("create", path, error);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    let storage = FileStorage(file);
    if let Err(error) = StripedFile::format(&storage, header) {
        let _ = fs::remove_file(path);
        return Err(failed(error).into());
    }
    sync_folder(path)
}

/// Makes a new name in the folder of this path durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), Error> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| OverlayError::io("make durable the folder", folder, error).into())
}

// A base's path as its overlay has it: relative to the overlay's folder.
fn beside(overlay: &Path, base: &Path) -> PathBuf {
    overlay
        .parent()
        .map_or_else(|| base.into(), |folder| folder.join(base))
}

//! A disk that is open and served.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{Contents, DiskSpec, DiskStatus, refuse};
use crate::Error;
use crate::image::{Image, ImageOptions};
use crate::layer::BlockDevice;
use crate::layer::crypt::CryptDevice;
use crate::layer::file::FileDevice;
use crate::layer::null::NullDevice;
use crate::layer::overlay::OverlayDevice;
use crate::layer::polled::PolledDevice;
use crate::overlay::files::OpenOptions;
use crate::rate_limit::Limiter;
use crate::remote;
use crate::sector_cipher::SectorCipher;
use crate::server::DiskServer;

/// A disk that is open and served.
#[derive(Debug)]
pub(super) struct ServedDisk {
    pub(super) spec: DiskSpec,
    pub(super) server: DiskServer,
    pub(super) limiter: Arc<Limiter>,
    pub(super) overlay: Option<Arc<OverlayDevice>>,
    pub(super) image: Option<Arc<Image>>,
    pub(super) uncached: bool,
    pub(super) encrypted: bool,
    /// Serving it ends because somebody asked for it.
    pub(super) removed: Arc<AtomicBool>,
}

impl ServedDisk {
    /// What it looks like now.
    pub(super) fn status(&self) -> DiskStatus {
        DiskStatus {
            spec: self.spec.clone(),
            capacity_bytes: self.server.disk().capacity_bytes(),
            uncached: self.uncached,
            encrypted: self.encrypted,
            layers: self
                .overlay
                .as_ref()
                .map(|overlay| overlay.chain().layers().len()),
            source: self
                .overlay
                .as_ref()
                .and_then(|overlay| overlay.source_counters()),
            counters: self.server.metrics(),
            latencies: self.server.latencies(),
        }
    }

    /// Makes its image larger. The guest is told by [`DiskServer::resize`].
    pub(super) fn grow(&self, bytes: u64) -> Result<(), Error> {
        let id = &self.spec.id;
        if let Some(overlay) = &self.overlay {
            return Ok(overlay.chain().top().grow(bytes)?);
        }
        let image = self.image.as_ref();
        let image = image.ok_or_else(|| refuse(id, "it has no image that could grow"))?;
        if bytes < image.bytes() {
            return Err(refuse(
                id,
                "disks only grow: a guest would lose what is at the end",
            ));
        }
        let grown = image.file().set_len(bytes);
        grown.map_err(|error| Error::io(format!("can't grow the image of disk {id}"), error))
    }
}

/// An open disk, before it is limited and served.
pub(super) struct Opened {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) overlay: Option<Arc<OverlayDevice>>,
    pub(super) image: Option<Arc<Image>>,
    pub(super) uncached: bool,
}

/// Opens what a disk is made of.
pub(super) fn open(spec: &DiskSpec, cipher: Option<Arc<SectorCipher>>) -> Result<Opened, Error> {
    let (read_only, direct) = (spec.read_only, spec.direct);
    match &spec.contents {
        Contents::Null(_) if cipher.is_some() => {
            Err(refuse(&spec.id, "nothing can't be encrypted"))
        }
        Contents::Null(bytes) => Ok(Opened {
            device: Arc::new(NullDevice::new(*bytes)),
            overlay: None,
            image: None,
            uncached: true,
        }),
        Contents::Raw(path) => {
            let image = Arc::new(Image::open(&ImageOptions {
                path: path.clone(),
                read_only,
                direct,
            })?);
            let mut device: Arc<dyn BlockDevice> = if spec.io_poll {
                Arc::new(PolledDevice::new(Arc::clone(&image), path, spec.queues)?)
            } else {
                Arc::new(FileDevice::new(Arc::clone(&image)))
            };
            if let Some(cipher) = cipher {
                device = Arc::new(CryptDevice::new(device, cipher, 0));
            }
            Ok(Opened {
                device,
                overlay: None,
                uncached: image.direct().is_some(),
                image: Some(image),
            })
        }
        Contents::Overlay(path) => {
            let options = OpenOptions {
                read_only,
                direct,
                cipher,
            };
            let fetch = spec.base.fetch_options();
            let open = remote::files::open_overlay(path, &options, &fetch)?;
            let images = open.images.iter().chain(&open.raw);
            let uncached = images
                .map(|image| image.direct())
                .all(|direct| direct.is_some());
            let overlay = Arc::new(OverlayDevice::new(open));
            Ok(Opened {
                device: Arc::clone(&overlay) as Arc<dyn BlockDevice>,
                overlay: Some(overlay),
                image: None,
                uncached,
            })
        }
    }
}

//! `keelson-blk image export` and `import`

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use indicatif::ProgressBar;
use keelson_blk::overlay::{Chain, Place};
use keelson_blk::{Error, qcow2, remote};

use super::{Open, Server, WholeImage, open_options, progress_bar, say};

/// The arguments of `image export`.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    open: Open,
    #[command(flatten)]
    server: Server,
    /// The new raw file
    target: PathBuf,
}

/// The arguments of `image import`.
#[derive(Debug, Args)]
pub struct Import {
    /// The qcow2 image
    source: PathBuf,
    #[command(flatten)]
    whole: WholeImage,
    /// The new raw file
    target: PathBuf,
}

/// Writes the whole disk to a raw file.
pub fn export(arguments: &Export) -> Result<(), Error> {
    let options = open_options(arguments.open.key_fd, true)?;
    let fetch = arguments.server.options();
    let opened = remote::files::open_overlay(&arguments.open.path, &options, &fetch)?;
    let failed = |source| Error::Io {
        action: format!("can't write {}", arguments.target.display()),
        source,
    };
    let target = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&arguments.target)
        .map_err(failed)?;
    let bar = progress_bar();
    if let Err(error) = copy_out(&opened.chain, &target, &bar) {
        let _ = fs::remove_file(&arguments.target);
        return Err(failed(error));
    }
    bar.finish_and_clear();
    say(&format!("{} created", arguments.target.display()))
}

fn copy_out(chain: &Arc<Chain>, target: &File, bar: &ProgressBar) -> io::Result<()> {
    const CHUNK: u64 = 1 << 20;
    let mut buffer = vec![0; 1 << 20];
    target.set_len(chain.bytes())?;
    bar.set_length(chain.bytes());
    let mut offset = 0;
    while offset < chain.bytes() {
        let segment = chain.locate(offset, chain.bytes() - offset);
        let len = match segment.place {
            Place::Zero => segment.len,
            _ => segment.len.min(CHUNK),
        };
        if segment.place != Place::Zero {
            let part = usize::try_from(len).unwrap_or(0);
            let part = buffer.get_mut(..part).unwrap_or_default();
            chain.read(part, offset)?;
            if part.iter().any(|byte| *byte != 0) {
                target.write_all_at(part, offset)?;
            }
        }
        offset += len;
        bar.set_position(offset);
    }
    target.sync_all()
}

/// Reads a qcow2 image.
pub fn import(arguments: &Import) -> Result<(), Error> {
    let failed = |source| Error::OpenImage {
        path: arguments.source.clone(),
        source,
    };
    let mut source = File::open(&arguments.source).map_err(failed)?;
    let bar = progress_bar();
    bar.set_length(source.metadata().map_err(failed)?.len());
    let whole = &arguments.whole;
    whole.check_file(&mut source, &arguments.source, |done| {
        bar.set_position(done);
    })?;
    let imported = qcow2::import(source, &arguments.target, |done, size| {
        bar.set_length(size);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    imported.map_err(|source| Error::Qcow2 {
        path: arguments.source.clone(),
        source,
    })?;
    say(&format!("{} created", arguments.target.display()))
}

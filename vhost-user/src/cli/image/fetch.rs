//! `keelson-blk image fetch`

use std::io;

use clap::Args;
use indicatif::ProgressBar;
use keelson_blk::overlay::{Chain, Place};
use keelson_blk::{Error, remote};

use super::{Open, Server, WholeImage, open_options, progress_bar, say};

/// The arguments of `image fetch`.
#[derive(Debug, Args)]
pub struct Fetch {
    #[command(flatten)]
    open: Open,
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    whole: WholeImage,
}

/// Fetches all of a base.
pub fn fetch(arguments: &Fetch) -> Result<(), Error> {
    let options = open_options(arguments.open.key_fd, false)?;
    let fetch = arguments.server.options();
    let opened = remote::files::open_overlay(&arguments.open.path, &options, &fetch)?;
    let bar = progress_bar();
    let failed = |source| Error::Io {
        action: format!("can't fetch all of {}", arguments.open.path.display()),
        source,
    };
    let fetched = fetch_all(&opened.chain, &bar);
    bar.finish_and_clear();
    // What came is kept in any case.
    opened.chain.flush().map_err(failed)?;
    fetched.map_err(failed)?;
    if arguments.whole.is_given() {
        check_whole(arguments, &opened.chain)?;
    }
    say(&format!(
        "{} has all of its base",
        arguments.open.path.display()
    ))
}

fn fetch_all(chain: &Chain, bar: &ProgressBar) -> io::Result<()> {
    let mut offset = 0;
    let mut byte = [0];
    bar.set_length(chain.bytes());
    while offset < chain.bytes() {
        let segment = chain.locate(offset, chain.bytes() - offset);
        if segment.place == Place::Absent {
            // All of its chunk comes with it.
            chain.read(&mut byte, offset)?;
            continue;
        }
        offset += segment.len;
        bar.set_position(offset);
    }
    Ok(())
}

/// Compares the disk, as far as its base goes, with what the base is to be. A guest may have written
/// to it already; then it differs.
fn check_whole(arguments: &Fetch, chain: &Chain) -> Result<(), Error> {
    const CHUNK: u64 = 1 << 20;
    let path = &arguments.open.path;
    let lowest = chain.layers().last();
    let bytes = lowest.map_or(0, |layer| layer.header().base.bytes());
    let failed = |source| Error::OpenImage {
        path: path.clone(),
        source,
    };
    if bytes > chain.bytes() {
        let message = "it is smaller than its base, so it can't be compared with it as a whole";
        return Err(failed(io::Error::other(message)));
    }
    let mut hasher = arguments.whole.hasher();
    let mut buffer = vec![0; 1 << 20];
    let bar = progress_bar();
    bar.set_length(bytes);
    let mut offset = 0;
    while offset < bytes {
        let len = CHUNK.min(bytes - offset);
        let part = buffer.get_mut(..usize::try_from(len).unwrap_or(0));
        let part = part.unwrap_or_default();
        chain.read(part, offset).map_err(failed)?;
        hasher.update(part);
        offset += len;
        bar.set_position(offset);
    }
    bar.finish_and_clear();
    hasher.check(path)
}

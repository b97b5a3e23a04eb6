//! `keelson-blk image`: create, look at and change images that are not being served.

mod copy;
mod create;
mod fetch;
mod info;
mod publish;
mod whole_image;

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use keelson_blk::Error;
use keelson_blk::overlay::files::{self, OpenOptions};
use keelson_blk::overlay::snapshot;
use keelson_blk::remote::{self, ClientOptions, FetchOptions};

use self::copy::{Export, Import, export, import};
use self::create::{Create, create};
use self::fetch::{Fetch, fetch};
use self::info::{Info, check, info};
use self::publish::{MakeManifest, make_manifest};
use self::whole_image::WholeImage;
use super::{key, size};

/// What to do with an image.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Create an overlay, or a sparse image that stands on nothing
    Create(Create),
    /// Show what an overlay says about itself and its layers
    Info(Info),
    /// Check an overlay and everything that it stands on, and repair damaged copies
    Check(Open),
    /// Make what the disk holds now a snapshot at PATH.NAME, and go on in a new layer
    Snapshot(Snapshot),
    /// Make a disk larger
    Resize(Resize),
    /// Say where a base is now, or that a copy of it will do
    Rebase(Rebase),
    /// Write the whole disk to a new raw file
    Export(Export),
    /// Read a qcow2 image into a new raw file
    Import(Import),
    /// Write the checksums of a raw image that is to be published on a server to IMAGE.manifest
    Manifest(MakeManifest),
    /// Fetch all that is still on the server of an overlay's base
    Fetch(Fetch),
}

/// How a server is reached.
#[derive(Debug, Args)]
struct Server {
    /// Certificates (PEM) to trust instead of the system's
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl Server {
    fn options(&self) -> FetchOptions {
        FetchOptions {
            client: ClientOptions {
                ca_file: self.ca_file.clone(),
            },
            ..FetchOptions::default()
        }
    }
}

/// An overlay, and its key.
#[derive(Debug, Args)]
pub struct Open {
    /// The overlay
    path: PathBuf,
    /// The descriptor with its key
    #[arg(long)]
    key_fd: Option<RawFd>,
}

/// The arguments of `image snapshot`.
#[derive(Debug, Args)]
pub struct Snapshot {
    #[command(flatten)]
    open: Open,
    /// What to call it
    name: String,
}

/// The arguments of `image resize`.
#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    open: Open,
    /// The new size, for example 20G
    #[arg(value_parser = size::parse)]
    size: u64,
}

/// The arguments of `image rebase`.
#[derive(Debug, Args)]
pub struct Rebase {
    /// The overlay
    path: PathBuf,
    /// Its base, with the same content: a path, or the address of an image on a server
    #[arg(long)]
    base: PathBuf,
    #[command(flatten)]
    server: Server,
}

/// Does it, and says on stdout what came of it.
pub fn run(command: &ImageCommand) -> Result<(), Error> {
    match command {
        ImageCommand::Create(arguments) => create(arguments),
        ImageCommand::Info(arguments) => info(arguments),
        ImageCommand::Check(arguments) => check(arguments),
        ImageCommand::Snapshot(arguments) => {
            let cipher = key::read(arguments.open.key_fd)?;
            let made = snapshot::snapshot(&arguments.open.path, &arguments.name, cipher)?;
            say(&format!("{} created", made.display()))
        }
        ImageCommand::Resize(arguments) => {
            let (_image, layer) = files::open_layer(
                &arguments.open.path,
                &open_options(arguments.open.key_fd, false)?,
                true,
            )?;
            layer.grow(arguments.size)?;
            say(&format!("{} resized", arguments.open.path.display()))
        }
        ImageCommand::Rebase(arguments) => {
            match arguments
                .base
                .to_str()
                .filter(|base| remote::files::is_url(base))
            {
                Some(url) => {
                    remote::files::rebase(&arguments.path, url, &arguments.server.options())?;
                }
                None => files::rebase(&arguments.path, &arguments.base)?,
            }
            say(&format!("{} rebased", arguments.path.display()))
        }
        ImageCommand::Export(arguments) => export(arguments),
        ImageCommand::Import(arguments) => import(arguments),
        ImageCommand::Manifest(arguments) => make_manifest(arguments),
        ImageCommand::Fetch(arguments) => fetch(arguments),
    }
}

fn open_options(key_fd: Option<RawFd>, read_only: bool) -> Result<OpenOptions, Error> {
    Ok(OpenOptions {
        read_only,
        cipher: key::read(key_fd)?,
        ..OpenOptions::default()
    })
}

fn say(line: &str) -> Result<(), Error> {
    writeln!(io::stdout(), "{line}").map_err(|source| Error::Io {
        action: "can't print".into(),
        source,
    })
}

// Nothing is drawn where stderr is no terminal.
fn progress_bar() -> ProgressBar {
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

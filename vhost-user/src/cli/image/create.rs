//! `keelson-blk image create`

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use keelson_blk::Error;
use keelson_blk::overlay::files::{self, CreateOptions, NewBase};
use keelson_blk::remote::{self, files::Checksums};

use super::{Server, key, say, size};

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    /// The disk's bytes, one after the other
    #[default]
    Raw,
    /// What `image create` makes
    Overlay,
}

/// The arguments of `image create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The new file
    path: PathBuf,
    /// The image that it stands on, which is only read from then on: a path, or the address of a
    /// raw image (https://… or http://…), of which is fetched what is read
    #[arg(long, value_name = "BASE")]
    overlay_of: Option<PathBuf>,
    #[command(flatten)]
    remote: RemoteBase,
    /// What the base is. Not guessed, since a guest could make a raw image look like an overlay
    #[arg(long, value_enum, default_value_t, requires = "overlay_of")]
    base_format: Format,
    /// The disk's size, for example 20G; the base's unless given
    #[arg(long, value_parser = size::parse)]
    size: Option<u64>,
    /// How much is copied up when a part of it is first written: 64K to 1M
    #[arg(long, value_parser = size::parse)]
    stripe: Option<u64>,
    /// Encrypt it with the key of 32 or 64 bytes that this descriptor holds (a pipe, say)
    #[arg(long)]
    key_fd: Option<RawFd>,
}

/// How a base on a server is trusted.
#[derive(Debug, Args)]
struct RemoteBase {
    /// Take what the server sends without checksums. A changed ETag or Last-Modified is noticed
    #[arg(long, requires = "overlay_of")]
    no_checksums: bool,
    /// The SHA-256 of the manifest beside the image, which you know from elsewhere
    #[arg(long, value_name = "HEX", value_parser = parse_digest, conflicts_with = "no_checksums")]
    manifest_sha256: Option<Digest>,
    #[command(flatten)]
    server: Server,
}

#[derive(Clone, Copy, Debug)]
struct Digest([u8; 32]);

/// Creates an image.
pub fn create(arguments: &Create) -> Result<(), Error> {
    let url = arguments.overlay_of.as_ref().and_then(|base| base.to_str());
    let base = match &arguments.overlay_of {
        None => NewBase::None,
        Some(_) if let Some(url) = url.filter(|url| remote::files::is_url(url)) => {
            let checksums = match &arguments.remote {
                remote if remote.no_checksums => Checksums::None,
                remote => match remote.manifest_sha256 {
                    Some(Digest(digest)) => Checksums::Pinned(digest),
                    None => Checksums::Manifest,
                },
            };
            let options = arguments.remote.server.options();
            let folder = remote::files::folder_of(&arguments.path);
            remote::files::describe(url, checksums, &options, &folder)?
        }
        Some(base) => NewBase::Image(
            base.clone(),
            match arguments.base_format {
                Format::Raw => files::Format::Raw,
                Format::Overlay => files::Format::Overlay,
            },
        ),
    };
    let stripe_bytes = arguments
        .stripe
        .map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
    files::create(&CreateOptions {
        path: arguments.path.clone(),
        base,
        bytes: arguments.size,
        stripe_bytes,
        cipher: key::read(arguments.key_fd)?,
    })?;
    say(&format!("{} created", arguments.path.display()))
}

fn parse_digest(text: &str) -> Result<Digest, String> {
    let digest = remote::manifest::decode(text);
    digest
        .map(Digest)
        .ok_or_else(|| "not 64 hexadecimal digits in lower case".into())
}

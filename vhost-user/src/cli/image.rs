//! `keelson-blk image`: create, look at and change images that are not being served.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use keelson_blk::overlay::files::{self, CreateOptions, NewBase, OpenOptions};
use keelson_blk::overlay::header::{Base, Header};
use keelson_blk::overlay::snapshot;
use keelson_blk::overlay::{Chain, FileStorage, OverlayError, Place, StripedFile};
use keelson_blk::remote::files::Checksums;
use keelson_blk::remote::{self, ClientOptions, FetchOptions, Manifest};
use keelson_blk::{Error, qcow2};
use serde_json::{Value, json};

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

/// The arguments of `image manifest`.
#[derive(Debug, Args)]
pub struct MakeManifest {
    /// The raw image
    path: PathBuf,
    /// What is fetched and verified at once: 64K to 4M
    #[arg(long, value_parser = size::parse, default_value = "256K")]
    chunk: u64,
}

/// The arguments of `image fetch`.
#[derive(Debug, Args)]
pub struct Fetch {
    #[command(flatten)]
    open: Open,
    #[command(flatten)]
    server: Server,
}

/// The arguments of `image info`.
#[derive(Debug, Args)]
pub struct Info {
    /// The overlay
    path: PathBuf,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
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
    /// The new raw file
    target: PathBuf,
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

fn parse_digest(text: &str) -> Result<Digest, String> {
    let digest = remote::manifest::decode(text);
    digest
        .map(Digest)
        .ok_or_else(|| "not 64 hexadecimal digits in lower case".into())
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

fn create(arguments: &Create) -> Result<(), Error> {
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

fn info(arguments: &Info) -> Result<(), Error> {
    // Without a lock or a key: it may be being served.
    let mut layers = Vec::new();
    let mut path = arguments.path.clone();
    loop {
        let failed = |source| Error::OpenImage {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let allocated = file.metadata().map_err(failed)?.blocks() * 512;
        let header = StripedFile::read_header(&FileStorage(file), &path)?;
        layers.push((path.clone(), header.clone(), allocated));
        match &header.base {
            Base::Striped { path: base, .. } if layers.len() <= files::MAX_LAYERS => {
                path = path.parent().unwrap_or(Path::new("")).join(base);
            }
            _ => break,
        }
    }
    match arguments.output {
        Output::Json => {
            let layers = layers
                .iter()
                .map(|(path, header, allocated)| describe(path, header, *allocated));
            say(&json!({ "layers": layers.collect::<Vec<_>>() }).to_string())
        }
        Output::Text => {
            for (path, header, allocated) in &layers {
                say(&text(path, header, *allocated))?;
            }
            Ok(())
        }
    }
}

fn describe(path: &Path, header: &Header, allocated: u64) -> Value {
    let base = match &header.base {
        Base::None => Value::Null,
        Base::Raw { path, bytes, .. } => {
            json!({ "format": "raw", "path": path, "bytes": bytes })
        }
        Base::Striped {
            path, bytes, uuid, ..
        } => {
            json!({ "format": "overlay", "path": path, "bytes": bytes, "uuid": uuid.to_string() })
        }
        Base::Http {
            url,
            bytes,
            manifest,
            ..
        } => json!({
            "format": "http",
            "url": url,
            "bytes": bytes,
            "manifest_sha256": manifest.map(|digest| remote::manifest::hex(&digest)),
        }),
    };
    json!({
        "path": path,
        "uuid": header.uuid.to_string(),
        "bytes": header.bytes,
        "largest_bytes": header.largest_size(),
        "stripe_bytes": header.stripe_bytes,
        "allocated_bytes": allocated,
        "encrypted": header.key_check.is_some(),
        "sealed": header.sealed,
        "base": base,
    })
}

fn text(path: &Path, header: &Header, allocated: u64) -> String {
    let base = match &header.base {
        Base::None => "nothing".into(),
        Base::Raw { path, .. } => format!("{} (raw)", path.display()),
        Base::Striped { path, .. } => format!("{} (overlay)", path.display()),
        Base::Http { url, .. } => url.clone(),
    };
    let mut notes = String::new();
    if header.key_check.is_some() {
        notes.push_str(", encrypted");
    }
    if header.sealed {
        notes.push_str(", sealed");
    }
    format!(
        "{}: {} in stripes of {}, {} allocated{notes}\n  on {base}",
        path.display(),
        size::show(header.bytes),
        size::show(header.stripe_bytes.into()),
        size::show(allocated),
    )
}

fn check(arguments: &Open) -> Result<(), Error> {
    let cipher = key::read(arguments.key_fd)?;
    let open = |read_only| {
        let options = OpenOptions {
            read_only,
            cipher: cipher.clone(),
            ..OpenOptions::default()
        };
        let fetch = FetchOptions::default();
        remote::files::open_overlay(&arguments.path, &options, &fetch)
    };
    // A snapshot is only looked at.
    let opened = match open(false) {
        Err(Error::Overlay(OverlayError::Sealed { .. })) => open(true)?,
        other => other?,
    };
    for layer in opened.chain.layers().iter().skip(opened.scratch.into()) {
        say(&format!(
            "{}: {} of {} stripes are here",
            layer.path().display(),
            layer.stripes_present(),
            layer.header().stripes()
        ))?;
    }
    say(&format!("{} is whole", arguments.path.display()))
}

fn export(arguments: &Export) -> Result<(), Error> {
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

fn import(arguments: &Import) -> Result<(), Error> {
    let source = File::open(&arguments.source).map_err(|source| Error::OpenImage {
        path: arguments.source.clone(),
        source,
    })?;
    let bar = progress_bar();
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

fn make_manifest(arguments: &MakeManifest) -> Result<(), Error> {
    let failed = |source| Error::OpenImage {
        path: arguments.path.clone(),
        source,
    };
    let mut image = File::open(&arguments.path).map_err(failed)?;
    if !arguments.chunk.is_power_of_two()
        || !remote::manifest::CHUNK_BYTES.contains(&arguments.chunk)
    {
        return Err(failed(io::Error::other(
            "--chunk takes a power of two from 64K to 4M",
        )));
    }
    let bar = progress_bar();
    bar.set_length(image.seek(SeekFrom::End(0)).map_err(failed)?);
    image.rewind().map_err(failed)?;
    let manifest = Manifest::of(&mut image, arguments.chunk, |done| bar.set_position(done));
    bar.finish_and_clear();
    let text = manifest.map_err(failed)?.to_text();
    let mut target = arguments.path.clone().into_os_string();
    target.push(remote::manifest::SUFFIX);
    let target = PathBuf::from(target);
    fs::write(&target, &text).map_err(|source| Error::Io {
        action: format!("can't write {}", target.display()),
        source,
    })?;
    let digest = remote::manifest::hex(&remote::manifest::digest(text.as_bytes()));
    say(&format!("{} created\n  SHA-256 {digest}", target.display()))
}

fn fetch(arguments: &Fetch) -> Result<(), Error> {
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

// Nothing is drawn where stderr is no terminal.
fn progress_bar() -> ProgressBar {
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

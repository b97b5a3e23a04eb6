//! `keelson-blk image info` and `check`

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use keelson_blk::Error;
use keelson_blk::overlay::files::{self, OpenOptions};
use keelson_blk::overlay::header::{Base, Header};
use keelson_blk::overlay::{FileStorage, OverlayError, StripedFile};
use keelson_blk::remote::{self, FetchOptions};
use serde_json::{Value, json};

use super::{Open, key, say, size};

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

/// Shows the layers.
pub fn info(arguments: &Info) -> Result<(), Error> {
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

/// Checks and repairs.
pub fn check(arguments: &Open) -> Result<(), Error> {
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

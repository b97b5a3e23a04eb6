//! One image on one HTTP server, read in ranges.

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Uri, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, BodyReader};

use super::RemoteError;
use super::manifest::{MAX_MANIFEST, SUFFIX};
use crate::overlay::header::MAX_REFERENCE;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For the head of an answer, and for each piece of its body.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: u32 = 5;
/// For a whole manifest.
const MANIFEST_TIMEOUT: Duration = Duration::from_mins(5);

/// How servers are reached.
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// Certificates (PEM) to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
}

/// What a server says about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of what would change with the image: its strong ETag, else Last-Modified.
    pub validator: Option<[u8; 32]>,
}

/// An image's address, and connections to its server.
#[derive(Clone, Debug)]
pub struct HttpImage {
    agent: Agent,
    url: String,
}

impl HttpImage {
    /// Of an address with http or https. Connects to nothing yet.
    pub fn new(url: &str, options: &ClientOptions) -> Result<Self, RemoteError> {
        let secure = check_url(url)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // No redirect may lead out of TLS.
            .https_only(secure)
            .max_redirects(MAX_REDIRECTS)
            .accept_encoding("identity")
            .user_agent(concat!("keelson-blk/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .timeout_per_write(Some(READ_TIMEOUT));
        if secure {
            let roots = roots(options.ca_file.as_deref())?;
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Self {
            agent: config.build().into(),
            url: url.into(),
        })
    }

    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks for the image's size, and for what would change with it.
    pub fn describe(&self) -> Result<Description, RemoteError> {
        let (headers, _) = self.get_range(0, 1)?;
        Ok(Description {
            bytes: content_range(&headers)
                .ok_or_else(|| self.failed("its Content-Range can't be read"))?
                .2,
            validator: validator(&headers),
        })
    }

    /// Begins to read a range of an image that has `expected`'s size, and its validator if there
    /// is one to compare.
    pub fn read(
        &self,
        offset: u64,
        len: u64,
        expected: &Description,
    ) -> Result<BodyReader<'static>, RemoteError> {
        let changed = |reason: String| RemoteError::Changed {
            url: self.url.clone(),
            reason,
        };
        let (headers, body) = self.get_range(offset, len).map_err(|error| match error {
            RemoteError::Status { status: 416, .. } => {
                changed(format!("it is shorter than {} bytes", offset + len))
            }
            error => error,
        })?;
        let (first, last, total) = content_range(&headers)
            .ok_or_else(|| self.failed("its Content-Range can't be read"))?;
        if total != expected.bytes {
            let had = expected.bytes;
            return Err(changed(format!("it had {had} bytes and has {total} now")));
        }
        if (first, last) != (offset, offset + len - 1) {
            return Err(self.failed("the server answers with another range than was asked for"));
        }
        if expected.validator.is_some() && validator(&headers) != expected.validator {
            return Err(changed("its ETag or Last-Modified is another".into()));
        }
        Ok(body.into_reader())
    }

    /// The manifest beside the image, if there is one.
    pub fn manifest(&self) -> Result<Option<Vec<u8>>, RemoteError> {
        let url = self.manifest_url();
        let failed = |reason: String| RemoteError::Transfer {
            url: url.clone(),
            reason,
        };
        let mut answer = self
            .agent
            .get(&url)
            .config()
            .timeout_global(Some(MANIFEST_TIMEOUT))
            .build()
            .call()
            .map_err(|error| failed(error.to_string()))?;
        match answer.status().as_u16() {
            200 => {}
            404 | 410 => return Ok(None),
            status => {
                return Err(RemoteError::Status { url, status });
            }
        }
        let text = answer.body_mut().with_config().limit(MAX_MANIFEST);
        text.read_to_vec()
            .map(Some)
            .map_err(|error| failed(error.to_string()))
    }

    /// Where the manifest is.
    pub fn manifest_url(&self) -> String {
        let (path, query) = match self.url.split_once('?') {
            Some((path, query)) => (path, format!("?{query}")),
            None => (self.url.as_str(), String::new()),
        };
        format!("{path}{SUFFIX}{query}")
    }

    pub(crate) fn failed(&self, reason: impl Display) -> RemoteError {
        RemoteError::Transfer {
            url: self.url.clone(),
            reason: reason.to_string(),
        }
    }

    fn get_range(&self, offset: u64, len: u64) -> Result<(HeaderMap, Body), RemoteError> {
        let last = offset + len.max(1) - 1;
        let answer = self
            .agent
            .get(&self.url)
            .header(header::RANGE, format!("bytes={offset}-{last}"))
            .call()
            .map_err(|error| self.failed(error))?;
        let url = self.url.clone();
        match answer.status().as_u16() {
            // Ranges would be of the encoded bytes.
            206 if is_encoded(answer.headers()) => Err(RemoteError::NoRanges { url }),
            206 => {
                let (head, body) = answer.into_parts();
                Ok((head.headers, body))
            }
            200 => Err(RemoteError::NoRanges { url }),
            status => Err(RemoteError::Status { url, status }),
        }
    }
}

/// Reads exactly `buffer`'s length, and calls `check` between pieces.
pub fn read_exact(
    reader: &mut impl Read,
    buffer: &mut [u8],
    mut check: impl FnMut() -> Result<(), String>,
) -> Result<(), String> {
    for piece in buffer.chunks_mut(64 << 10) {
        check()?;
        reader
            .read_exact(piece)
            .map_err(|error| format!("the connection broke off: {error}"))?;
    }
    Ok(())
}

// Whether it is https.
fn check_url(url: &str) -> Result<bool, RemoteError> {
    let refuse = |reason: &str| RemoteError::Url {
        url: url.into(),
        reason: reason.into(),
    };
    if url.len() > MAX_REFERENCE {
        return Err(refuse("it is too long"));
    }
    let parsed: Uri = url.parse().map_err(|_| refuse("it is no URL"))?;
    let authority = parsed.authority().ok_or_else(|| refuse("it has no host"))?;
    if authority.as_str().contains('@') {
        return Err(refuse(
            "it holds credentials, which would be written into the overlay",
        ));
    }
    match parsed.scheme_str() {
        Some("https") => Ok(true),
        Some("http") => Ok(false),
        _ => Err(refuse("it has to start with https:// or http://")),
    }
}

fn roots(ca_file: Option<&Path>) -> Result<RootCerts, RemoteError> {
    let failed = |path: &Path, reason: String| RemoteError::Certificates {
        path: path.into(),
        reason,
    };
    let certificates: Vec<Certificate<'static>> = if let Some(path) = ca_file {
        let text = std::fs::read(path).map_err(|error| failed(path, error.to_string()))?;
        let mut certificates = Vec::new();
        for item in parse_pem(&text) {
            if let PemItem::Certificate(certificate) =
                item.map_err(|error| failed(path, error.to_string()))?
            {
                certificates.push(certificate);
            }
        }
        certificates
    } else {
        let found = rustls_native_certs::load_native_certs();
        let owned = found.certs.iter();
        owned
            .map(|certificate| Certificate::from_der(certificate).to_owned())
            .collect()
    };
    if certificates.is_empty() {
        let place = ca_file.unwrap_or(Path::new("the system's store"));
        return Err(failed(
            place,
            "there are none; install ca-certificates, or name a file with --ca-file".into(),
        ));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

fn is_encoded(headers: &HeaderMap) -> bool {
    let encoding = headers.get(header::CONTENT_ENCODING);
    encoding.is_some_and(|encoding| encoding.as_bytes() != b"identity")
}

// `bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4).
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((
        first.trim().parse().ok()?,
        last.trim().parse().ok()?,
        total.trim().parse().ok()?,
    ))
}

// A weak ETag promises no equal bytes (RFC 9110, 8.8.1).
fn validator(headers: &HeaderMap) -> Option<[u8; 32]> {
    let strong = headers
        .get(header::ETAG)
        .filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    let value = strong.or_else(|| headers.get(header::LAST_MODIFIED))?;
    Some(Sha256::digest(value.as_bytes()).into())
}

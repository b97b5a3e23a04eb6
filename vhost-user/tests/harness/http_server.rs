//! A real HTTP server for images, which can be slow, wrong, or gone.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, Uri, header};
use axum::serve::Listener;
use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_rustls::server::TlsStream;

use super::PATIENCE;

/// What is wrong with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Each answer begins this much later.
    Slow(Duration),
    /// The connection breaks after this many bytes of a body.
    BreaksAfter(usize),
    /// It says that the image is this long.
    Length(u64),
    /// One byte of the image is another.
    Flipped(u64),
    /// It sends whole files only.
    NoRanges,
    /// It answers with this status.
    Status(u16),
}

#[derive(Debug)]
pub struct Published {
    pub image: Vec<u8>,
    pub manifest: Option<Vec<u8>>,
    pub etag: Option<String>,
    pub fault: Fault,
    /// The ranges of the image that were asked for, first and last byte.
    pub ranges: Vec<(u64, u64)>,
}

pub struct HttpServer {
    pub address: SocketAddr,
    scheme: &'static str,
    published: Arc<Mutex<Published>>,
    runtime: Option<Runtime>,
}

impl HttpServer {
    pub fn start(image: Vec<u8>, manifest: Option<Vec<u8>>) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), image, manifest, None)
    }

    /// With TLS, and the file with the certificate to trust.
    pub fn start_tls(image: Vec<u8>, manifest: Option<Vec<u8>>, ca_file: &PathBuf) -> Self {
        let certified = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
        std::fs::write(ca_file, certified.cert.pem()).unwrap();
        let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key.into())
            .unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        Self::start_at(address, image, manifest, Some(Arc::new(config)))
    }

    pub fn start_at(
        address: SocketAddr,
        image: Vec<u8>,
        manifest: Option<Vec<u8>>,
        tls: Option<Arc<ServerConfig>>,
    ) -> Self {
        let published = Arc::new(Mutex::new(Published {
            image,
            manifest,
            etag: Some("\"first\"".into()),
            fault: Fault::None,
            ranges: Vec::new(),
        }));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&published));
        let listener = runtime.block_on(TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        match tls {
            None => drop(runtime.spawn(async { axum::serve(listener, app).await })),
            Some(config) => {
                let listener = TlsListener(listener, TlsAcceptor::from(config));
                drop(runtime.spawn(async { axum::serve(listener, app).await }));
            }
        }
        Self {
            address,
            scheme,
            published,
            runtime: Some(runtime),
        }
    }

    pub fn url(&self) -> String {
        let (scheme, port) = (self.scheme, self.address.port());
        // The name that certificates are for.
        let host = if scheme == "https" {
            "localhost"
        } else {
            "127.0.0.1"
        };
        format!("{scheme}://{host}:{port}/images/debian.raw")
    }

    pub fn published(&self) -> MutexGuard<'_, Published> {
        self.published.lock().unwrap()
    }

    pub fn set_fault(&self, fault: Fault) {
        self.published().fault = fault;
    }

    pub fn take_ranges(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.published().ranges)
    }

    /// Waits until a range was asked for.
    pub fn wait_for_request(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.published().ranges.is_empty() {
            assert!(Instant::now() < deadline, "nothing is asked for");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct TlsListener(TcpListener, TlsAcceptor);

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            if let Ok((stream, address)) = self.0.accept().await
                && let Ok(stream) = self.1.accept(stream).await
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

async fn answer(
    State(published): State<Arc<Mutex<Published>>>,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    if uri.path().ends_with(".manifest") {
        return match &published.lock().unwrap().manifest {
            Some(manifest) => Response::new(manifest.clone().into()),
            None => status(404),
        };
    }
    let range = headers.get(header::RANGE).map(|range| {
        let range = range.to_str().unwrap().strip_prefix("bytes=").unwrap();
        let (first, last) = range.split_once('-').unwrap();
        (first.parse::<u64>().unwrap(), last.parse::<u64>().unwrap())
    });
    let fault = {
        let mut published = published.lock().unwrap();
        published.ranges.extend(range);
        published.fault
    };
    if let Fault::Slow(time) = fault {
        tokio::time::sleep(time).await;
    }
    if let Fault::Status(code) = fault {
        return status(code);
    }
    let published = published.lock().unwrap();
    let total = match fault {
        Fault::Length(bytes) => bytes,
        _ => published.image.len() as u64,
    };
    let Some((first, last)) = range.filter(|_| fault != Fault::NoRanges) else {
        return Response::new(published.image.clone().into());
    };
    if first >= total {
        return status(416);
    }
    let last = last.min(published.image.len() as u64 - 1);
    let mut part =
        published.image[usize::try_from(first).unwrap()..=usize::try_from(last).unwrap()].to_vec();
    if let Fault::Flipped(place) = fault
        && (first..=last).contains(&place)
    {
        part[usize::try_from(place - first).unwrap()] ^= 1;
    }
    let mut answer = Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(
            header::CONTENT_RANGE,
            format!("bytes {first}-{last}/{total}"),
        )
        .header(header::CONTENT_LENGTH, part.len());
    if let Some(etag) = &published.etag {
        answer = answer.header(header::ETAG, etag);
    }
    let body = match fault {
        Fault::BreaksAfter(bytes) if bytes < part.len() => {
            part.truncate(bytes);
            let pieces = [Ok(Bytes::from(part)), Err(io::Error::other("broken"))];
            Body::from_stream(futures::stream::iter(pieces))
        }
        _ => part.into(),
    };
    answer.body(body).unwrap()
}

fn status(code: u16) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
}

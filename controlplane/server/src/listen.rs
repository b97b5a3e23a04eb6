//! Listeners, with or without TLS.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::options::Listen;
use crate::tls::ServerTls;

/// How long a client may take for its part of a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once.
const WAITING: usize = 256;
/// After a failed accept, for want of file descriptors most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens until `end`; what is returned ends when the last request is answered.
pub async fn listen(
    on: Listen,
    tls: Option<&ServerTls>,
    routes: Routes,
    end: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let address = on.address;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let server = Server::builder()
        .accept_http1(true)
        .initial_connection_window_size(Some(8 * 1024 * 1024))
        .initial_stream_window_size(Some(4 * 1024 * 1024))
        .add_routes(routes);
    let tls = tls.cloned().filter(|_| on.tls);
    Ok(tokio::spawn(async move {
        let outcome = if let Some(tls) = tls {
            let incoming = Box::pin(handshakes(listener, tls));
            server.serve_with_incoming_shutdown(incoming, end).await
        } else {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            server.serve_with_incoming_shutdown(incoming, end).await
        };
        if let Err(error) = outcome {
            tracing::error!(%address, %error, "a listener ended");
        }
    }))
}

/// Connections whose handshake is done. Who is slow at it holds up nobody. The listener goes with the
/// stream: the address is free then.
fn handshakes(
    listener: TcpListener,
    tls: ServerTls,
) -> impl Stream<Item = io::Result<TlsStream<TcpStream>>> {
    let state = (listener, tls, FuturesUnordered::new());
    futures::stream::unfold(state, async |(listener, tls, mut pending)| {
        loop {
            tokio::select! {
                accepted = listener.accept(), if pending.len() < WAITING => match accepted {
                    Ok((stream, _)) => pending.push(handshake(tls.config(), stream)),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                },
                Some(done) = pending.next() => if let Some(stream) = done {
                    return Some((Ok(stream), (listener, tls, pending)));
                },
            }
        }
    })
}

async fn handshake(config: Arc<ServerConfig>, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
    let _ = stream.set_nodelay(true);
    let handshake = TlsAcceptor::from(config).accept(stream);
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
    None
}

//! A host's way to the state store, which can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a cut connection looks whether it is whole again.
const PAUSE: Duration = Duration::from_millis(20);

/// A host's way to the state store: a forwarder for each of its members. Cut, it swallows everything, as
/// a network does.
pub struct Link {
    cut: Arc<AtomicBool>,
    urls: Vec<String>,
}

impl Link {
    /// A way to servers at `urls`, such as `http://127.0.0.1:2379`.
    ///
    /// # Panics
    /// If no address is free.
    pub fn to<S: AsRef<str>>(urls: &[S]) -> Self {
        Self::by("127.0.0.1", urls)
    }

    /// As [`Self::to`], by forwarders that have this address.
    ///
    /// # Panics
    /// If no port is free.
    pub fn by<S: AsRef<str>>(address: &str, urls: &[S]) -> Self {
        let cut = Arc::new(AtomicBool::new(false));
        let urls = urls.iter().map(|url| {
            let target = url.as_ref().trim_start_matches("http://").to_owned();
            let listener = TcpListener::bind((address, 0)).expect("a port is free");
            let address = listener.local_addr().expect("it is bound");
            let cut = Arc::clone(&cut);
            std::thread::spawn(move || forward(&listener, &target, &cut));
            format!("http://{address}")
        });
        Self {
            urls: urls.collect(),
            cut,
        }
    }

    /// The forwarders' URLs, joined by commas.
    pub fn urls(&self) -> String {
        self.urls.join(",")
    }

    /// Cuts it, or makes it whole again.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }
}

fn forward(listener: &TcpListener, target: &str, cut: &Arc<AtomicBool>) {
    for client in listener.incoming().flatten() {
        let (target, cut) = (target.to_owned(), Arc::clone(cut));
        std::thread::spawn(move || {
            wait_until_whole(&cut);
            let Ok(server) = TcpStream::connect(&target) else {
                return;
            };
            let (Ok(from_client), Ok(from_server)) = (client.try_clone(), server.try_clone())
            else {
                return;
            };
            let there = Arc::clone(&cut);
            std::thread::spawn(move || copy(from_client, server, &there));
            copy(from_server, client, &cut);
        });
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        wait_until_whole(cut);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The other direction ends as well then.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn wait_until_whole(cut: &AtomicBool) {
    while cut.load(Ordering::SeqCst) {
        std::thread::sleep(PAUSE);
    }
}

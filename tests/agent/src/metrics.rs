//! The agent's metrics.

use std::io::{Read, Write};
use std::net::TcpStream;

/// The page of metrics that an agent serves at an address.
///
/// # Panics
/// If it serves none.
pub fn metrics(address: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("metrics are served");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: keelson\r\nConnection: close\r\n\r\n")
        .expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("text");
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    page
}

//! A guest's flows on their way between the two agents: one message on a connection of their own, and what
//! became of it.

use std::io;
use std::time::Duration;

use keelson_ebpf::{MovedFlow, MovedFlows};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::connection;

/// How long a guest may stand still for its flows, from when they are read until the other side has them.
pub const FLOWS_TIME_LIMIT: Duration = Duration::from_secs(2);
/// The largest message, in bytes: all flows that the interfaces of a guest can have are less.
const SIZE_LIMIT: usize = 32 << 20;

/// The flows of a guest that moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestFlows {
    /// By the names of its interfaces.
    pub interfaces: Vec<(String, MovedFlows)>,
}

impl GuestFlows {
    /// How many they are.
    pub fn count(&self) -> u32 {
        let interfaces = self.interfaces.iter();
        let count: usize = interfaces.map(|(_, flows)| flows.count()).sum();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// What of a guest's flows moved, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// Flows that moved.
    pub moved: u32,
    /// Flows that the destination has no room for, or whose service or backend it doesn't have, and ports with an
    /// external one: they stay behind.
    pub left: u32,
}

/// What became of flows that were sent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Receipt {
    /// So many are in force.
    Taken(u32),
    /// Why none are.
    Refused(String),
}

/// Sends a guest's flows; how many the other side took.
pub async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    flows: &GuestFlows,
) -> io::Result<u32> {
    let message = encode(flows)?;
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_u32(length).await?;
    stream.write_all(&message).await?;
    stream.flush().await?;
    match connection::receive(stream).await? {
        Receipt::Taken(count) => Ok(count),
        Receipt::Refused(reason) => Err(io::Error::other(reason)),
    }
}

/// Waits for a guest's flows, as that version of the protocol has them, for as long as that takes; once they come,
/// they have to come quickly.
pub async fn receive<S: AsyncRead + Unpin>(stream: &mut S, version: u32) -> io::Result<GuestFlows> {
    let length = usize::try_from(stream.read_u32().await?).map_err(io::Error::other)?;
    if length > SIZE_LIMIT {
        return Err(io::Error::other(format!(
            "its flows are said to be {length} bytes; {SIZE_LIMIT} are allowed"
        )));
    }
    // Only what comes takes memory.
    let mut message = Vec::new();
    let mut limited = stream.take(length as u64);
    let reading = limited.read_to_end(&mut message);
    tokio::time::timeout(FLOWS_TIME_LIMIT, reading)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if message.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    decode(&message, version)
}

/// Says what became of them.
pub async fn acknowledge<S: AsyncWrite + Unpin>(
    stream: &mut S,
    taken: &Result<u32, String>,
) -> io::Result<()> {
    let receipt = match taken {
        Ok(count) => Receipt::Taken(*count),
        Err(reason) => Receipt::Refused(reason.clone()),
    };
    connection::send(stream, &receipt).await
}

/// The number of interfaces, then the name and the flows of each.
fn encode(flows: &GuestFlows) -> io::Result<Vec<u8>> {
    let count = u8::try_from(flows.interfaces.len()).map_err(io::Error::other)?;
    let mut interfaces = flows.interfaces.iter();
    interfaces
        .try_fold(vec![count], |message, interface| {
            postcard::to_extend(interface, message)
        })
        .map_err(io::Error::other)
}

/// As few interfaces as one byte can count: what comes of a message is not much larger than the message.
fn decode(message: &[u8], version: u32) -> io::Result<GuestFlows> {
    let (count, mut rest) = message.split_first().ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut interfaces = Vec::new();
    for _ in 0..*count {
        let interface = decode_interface(&mut rest, version);
        let interface = interface
            .map_err(|error| io::Error::other(format!("its flows can't be read: {error}")))?;
        interfaces.push(interface);
    }
    if !rest.is_empty() {
        return Err(io::Error::other("something follows its flows"));
    }
    Ok(GuestFlows { interfaces })
}

fn decode_interface(
    message: &mut &[u8],
    version: u32,
) -> Result<(String, MovedFlows), postcard::Error> {
    if version > 2 {
        return take(message);
    }
    // Up to version 2 flows to services stayed behind.
    let (name, direct): (String, Vec<MovedFlow>) = take(message)?;
    let flows = MovedFlows {
        direct,
        ..MovedFlows::default()
    };
    Ok((name, flows))
}

fn take<'a, T: Deserialize<'a>>(message: &mut &'a [u8]) -> Result<T, postcard::Error> {
    let (value, rest) = postcard::take_from_bytes(message)?;
    *message = rest;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime can be built")
    }

    fn receive_from(sent: &[u8], version: u32) -> io::Result<GuestFlows> {
        runtime().block_on(async {
            let (mut one, mut other) = tokio::io::duplex(1 << 20);
            one.write_all(sent).await.expect("it fits");
            drop(one);
            receive(&mut other, version).await
        })
    }

    proptest! {
        #[test]
        fn whatever_a_peer_sends_is_read_or_refused(
            length in 0_u32..200,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            version in 2_u32..=3,
        ) {
            let sent = [&length.to_be_bytes()[..], &bytes].concat();
            let whole = bytes.len() >= length as usize;
            match receive_from(&sent, version) {
                Ok(flows) => {
                    prop_assert!(whole);
                    let bytes: usize = flows.interfaces.iter().map(|(name, _)| name.len()).sum();
                    prop_assert!(bytes + flows.interfaces.len() < length as usize);
                }
                Err(error) if !whole => {
                    prop_assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                }
                Err(_) => {}
            }
        }
    }

    #[test]
    fn more_than_any_guest_has_is_refused_before_it_comes() {
        let error = receive_from(&u32::MAX.to_be_bytes(), 3).expect_err("too long");
        assert!(error.to_string().contains("allowed"), "{error}");
    }

    #[test]
    fn who_sends_slowly_is_not_waited_for() {
        let ended = runtime().block_on(async {
            let (mut one, mut other) = tokio::io::duplex(64);
            one.write_all(&[0, 0, 0, 9, 1]).await.expect("it fits");
            let ended = receive(&mut other, 3).await;
            drop(one);
            ended
        });
        assert_eq!(
            ended.expect_err("it never comes").kind(),
            io::ErrorKind::TimedOut
        );
    }

    #[test]
    fn what_was_sent_arrives_and_is_acknowledged() {
        let flows = GuestFlows {
            interfaces: ["eth0", "eth1"]
                .map(|name| (name.into(), MovedFlows::default()))
                .into(),
        };
        let (taken, refused, got) = runtime().block_on(async {
            let (mut one, mut other) = tokio::io::duplex(64);
            let receiver = async {
                let got = receive(&mut other, 3).await.expect("flows");
                acknowledge(&mut other, &Ok(7)).await.expect("sent");
                receive(&mut other, 3).await.expect("flows");
                let refusal = Err("no such interface".to_owned());
                acknowledge(&mut other, &refusal).await.expect("sent");
                got
            };
            let sender = async {
                let taken = send(&mut one, &flows).await;
                (taken, send(&mut one, &flows).await)
            };
            let (got, (taken, refused)) = tokio::join!(receiver, sender);
            (taken, refused, got)
        });
        assert_eq!(got, flows);
        assert_eq!(taken.expect("taken"), 7);
        let refused = refused.expect_err("refused").to_string();
        assert_eq!(refused, "no such interface");
    }

    /// From an agent that is yet to be upgraded: its flows to services stayed where they were.
    #[test]
    fn what_an_earlier_version_sends_is_read() {
        let flow = r#"{"peer": "192.0.2.1", "guest_port": 4000, "peer_port": 80, "protocol": 6, "local": 0,
            "opened_by_guest": true, "answered": true, "phase": 1, "finished": 0, "idle_milliseconds": 7}"#;
        let flow: MovedFlow = serde_json::from_str(flow).expect("a flow");
        let interface = postcard::to_stdvec(&("eth0", vec![flow])).expect("encoded");
        let message = [&[1][..], &interface].concat();
        let length = u32::try_from(message.len()).expect("small").to_be_bytes();
        let sent = [&length[..], &message].concat();
        let got = receive_from(&sent, 2).expect("flows");
        let [(name, flows)] = &got.interfaces[..] else {
            panic!("{got:?}");
        };
        assert_eq!(
            (name.as_str(), &flows.direct[..], flows.count()),
            ("eth0", &[flow][..], 1)
        );
        receive_from(&sent, 3).expect_err("a later version's has more");
    }
}

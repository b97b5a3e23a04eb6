//! What guests ask about their configuration, and the way back to them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use aya::maps::{MapData, RingBuf};
use keelson_ebpf_common::{ANSWER_MARK, QUESTION_LIMIT, flag};

use crate::datapath::Datapath;

/// Bytes of a question that stand before its frame.
const HEADER_LENGTH: usize = 8;

/// `AF_PACKET`, and the sizes of a mark and of an address, as the kernel takes them.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "both are small"
)]
const FAMILY: libc::c_ushort = libc::AF_PACKET as libc::c_ushort;
#[allow(clippy::cast_possible_truncation, reason = "it is 4")]
const MARK_LENGTH: libc::socklen_t = size_of::<u32>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation, reason = "it is 20")]
const ADDRESS_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_ll>() as libc::socklen_t;

/// Which of a guest's questions about its configuration go to whoever reads them (see
/// [`Datapath::take_question_reader`]), and only there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// DHCP and DHCPv6. Otherwise what has no source address yet is dropped, and the rest is judged by
    /// the rules.
    pub dhcp: bool,
    /// Router solicitations. Otherwise they go on.
    pub solicitations: bool,
}

impl Answers {
    pub(crate) fn flags(self) -> u16 {
        let dhcp = if self.dhcp { flag::ANSWERS_DHCP } else { 0 };
        let solicitations = if self.solicitations {
            flag::ANSWERS_SOLICITATIONS
        } else {
            0
        };
        dhcp | solicitations
    }
}

/// A frame that asks for its sender's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The interface that it came from: who asks, whatever the frame says.
    pub ifindex: u32,
    /// The frame, from the Ethernet header on. Its addresses were checked, its contents were not.
    pub frame: Vec<u8>,
}

/// Reads what guests ask; there is one of it. Its descriptor is readable when something is there.
pub struct QuestionReader {
    ring: RingBuf<MapData>,
}

impl Datapath {
    /// The reader of questions; `None` from the second call on.
    pub fn take_question_reader(&mut self) -> Option<QuestionReader> {
        let ring = self.object.questions.take()?;
        Some(QuestionReader { ring })
    }
}

impl QuestionReader {
    /// The next question, if one is there.
    pub fn next_question(&mut self) -> Option<Question> {
        loop {
            let item = self.ring.next()?;
            if let Some(question) = translate(&item) {
                return Some(question);
            }
        }
    }
}

impl AsRawFd for QuestionReader {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for QuestionReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl std::fmt::Debug for QuestionReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("QuestionReader")
            .finish_non_exhaustive()
    }
}

/// `None` if another version wrote it.
fn translate(item: &[u8]) -> Option<Question> {
    let (header, data) = item.split_at_checked(HEADER_LENGTH)?;
    let (ifindex, length) = header.split_at_checked(4)?;
    let ifindex = u32::from_ne_bytes(ifindex.try_into().ok()?);
    let length = u32::from_ne_bytes(length.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    if length > QUESTION_LIMIT {
        return None;
    }
    Some(Question {
        ifindex,
        frame: data.get(..length)?.to_vec(),
    })
}

/// Sends frames to guests that their programs let pass, whatever the rules say.
#[derive(Debug)]
pub struct AnswerSender {
    socket: OwnedFd,
}

impl AnswerSender {
    /// Opens the socket, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's: it takes `CAP_NET_RAW` and `CAP_NET_ADMIN`.
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes three numbers. The protocol zero: this socket receives nothing.
        let descriptor = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let mark = ANSWER_MARK;
        // SAFETY: the value is a u32 that lives through the call, with its size.
        let result = unsafe {
            libc::setsockopt(
                descriptor,
                libc::SOL_SOCKET,
                libc::SO_MARK,
                (&raw const mark).cast(),
                MARK_LENGTH,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket })
    }

    /// Sends a frame out of an interface. Never waits.
    ///
    /// # Errors
    /// The kernel's: `ENXIO` if the interface is gone, `ENETDOWN` if it is down, `ENOBUFS` if its queue is
    /// full or its program drops the frame, which is not for the guest.
    pub fn send(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        let address = libc::sockaddr_ll {
            sll_family: FAMILY,
            sll_protocol: 0,
            sll_ifindex: i32::try_from(ifindex).map_err(io::Error::other)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the frame and the address live through the call, which only reads them, with their sizes.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                ADDRESS_LENGTH,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

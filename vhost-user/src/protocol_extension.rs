//! Messages that the crate `vhost` 0.18 doesn't dispatch or leaves nothing to do with: the device
//! status, and the frontend's channel for notices of a changed configuration space.
//!
//! Each message is looked at before the crate reads it, and taken out if it is one of these.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};
use rustix::net::{SendAncillaryBuffer, sendmsg};
use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::backend::BlockBackend;

const SET_BACKEND_REQ_FD: u32 = 21;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;

const HEADER_BYTES: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// The channel on which the frontend takes notices.
#[derive(Debug)]
pub struct NoticeChannel(OwnedFd);

impl NoticeChannel {
    /// Says that the configuration space has changed. Never waits.
    pub fn config_changed(&self) -> io::Result<()> {
        let message = header(CONFIG_CHANGE, VERSION, 0);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        send(&self.0, &message, flags)?;
        Ok(())
    }
}

/// What became of the next message.
#[derive(Debug)]
pub enum Outcome {
    /// It is for the crate.
    NotMine,
    /// It was answered.
    Answered,
    /// It was answered, and brought the channel for notices.
    Notices(NoticeChannel),
}

/// Answers the next message if it is one of these. Waits for it.
pub fn handle(connection: &UnixStream, backend: &mut BlockBackend) -> io::Result<Outcome> {
    let mut bytes = [0; HEADER_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::WAITALL;
    let (len, _) = recv(connection, &mut bytes, flags)?;
    if len < HEADER_BYTES {
        return Ok(Outcome::NotMine);
    }
    let [request, flags, size] = fields(bytes);
    let feature = match request {
        SET_BACKEND_REQ_FD => VhostUserProtocolFeatures::BACKEND_REQ,
        SET_STATUS | GET_STATUS => VhostUserProtocolFeatures::STATUS,
        _ => return Ok(Outcome::NotMine),
    };
    let expected = if request == SET_STATUS { 8 } else { 0 };
    // QEMU sends an unused 64-bit body with its channel.
    let fits = size == expected || request == SET_BACKEND_REQ_FD && size == 8;
    if !backend.has(feature) || !fits || flags & VERSION_MASK != VERSION {
        // The crate refuses it, and ends the connection.
        return Ok(Outcome::NotMine);
    }
    let (body, files) = take(connection, size as usize)?;
    let mut outcome = Outcome::Answered;
    let mut reply = 0;
    match request {
        GET_STATUS => reply = u64::from(backend.status()),
        SET_STATUS => backend.set_status(body.to_le_bytes()[0]),
        _ => match <[OwnedFd; 1]>::try_from(files) {
            Ok([file]) => outcome = Outcome::Notices(NoticeChannel(file)),
            Err(_) => reply = 1,
        },
    }
    if request == GET_STATUS || flags & NEED_REPLY != 0 {
        let mut message = header(request, VERSION | REPLY, 8).to_vec();
        message.extend_from_slice(&reply.to_le_bytes());
        let slices = [IoSlice::new(&message)];
        let mut nothing = SendAncillaryBuffer::default();
        sendmsg(connection, &slices, &mut nothing, SendFlags::NOSIGNAL)?;
    }
    Ok(outcome)
}

fn take(connection: &UnixStream, body: usize) -> io::Result<(u64, Vec<OwnedFd>)> {
    let mut bytes = [0; HEADER_BYTES + 8];
    let wanted = bytes.get_mut(..HEADER_BYTES + body).unwrap_or_default();
    let mut slices = [IoSliceMut::new(wanted)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(connection, &mut slices, &mut ancillary, flags)?;
    if received.bytes < HEADER_BYTES + body {
        return Err(io::Error::other(
            "the frontend left in the middle of a message",
        ));
    }
    let mut files = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[HEADER_BYTES..]);
    Ok((u64::from_le_bytes(value), files))
}

fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (place, field) in bytes.chunks_exact_mut(4).zip([request, flags, size]) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

fn fields(bytes: [u8; HEADER_BYTES]) -> [u32; 3] {
    let (words, _) = bytes.as_chunks::<4>();
    let mut fields = [0; 3];
    for (field, word) in fields.iter_mut().zip(words) {
        *field = u32::from_le_bytes(*word);
    }
    fields
}

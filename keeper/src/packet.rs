//! Packets on a Unix socket, each with a descriptor or without.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::message::MAX_PACKET;

/// Sends a packet whole or not at all.
pub(crate) fn send(
    socket: impl AsFd,
    packet: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    let (socket, packet) = (socket.as_fd(), [IoSlice::new(packet)]);
    rustix::io::retry_on_intr(|| sendmsg(socket, &packet, &mut control, flags))?;
    Ok(())
}

/// Takes the next packet, and its descriptor if it has one; none when the other side has closed.
///
/// # Errors
/// What the system says; `InvalidData` for a packet that is too long or brings more than one descriptor.
pub(crate) fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut packet = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (socket, flags) = (socket.as_fd(), flags | RecvFlags::CMSG_CLOEXEC);
    let received =
        rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut control, flags))?;
    // Whatever came is owned from here on, so that nothing stays open.
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || descriptors.len() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet that is too long, or too many descriptors"));
    }
    packet.truncate(received.bytes);
    Ok((received.bytes > 0).then(|| (packet, descriptors.pop())))
}

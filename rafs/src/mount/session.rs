//! A FUSE session, of a new mount or of one that another process has served before.
//!
//! The kernel says INIT once in the life of a mount, and fuser 0.18, whose loop, parser and replies are used here, serves
//! only a descriptor on which it has seen one. So both kinds of session begin in the same way: fuser gets a socket,
//! hears INIT on it from this module, and answers; then the device takes the place of the socket under the same number
//! (dup3(2)), and fuser goes on to read from the kernel. For a new mount INIT and its answer are passed on between kernel
//! and fuser. For a mount that goes on, INIT is made up of what was agreed on then, and nobody hears the answer.
//!
//! Roads not taken: a loop of our own would repeat fuser's parser and its replies, some 1500 lines, for one that differs in
//! its first message. Relaying every request over the socket costs a copy of each reply. `fuse-backend-rs` starts in the
//! middle of a session, but its server writes the reply before the handler returns, and ours come from elsewhere.
//!
//! What of a session's state is whose: the kernel has the flags, names, nodes and what is open. This side has none. Node
//! numbers are places in the bootstrap, their generation is constant, look-ups are not counted, files and directories have
//! no handles, a position in a directory is a number of entries. So a session goes on with the same bootstrap as if it were
//! the same.
//!
//! Requests that were read and not answered when a process died:
//!
//! - **Linux 6.9 and later** sends them again when asked to (FUSE_NOTIFY_RESEND): the device's open file, on which they
//!   were read, lives on in whoever has a copy of the descriptor.
//! - **Before that** nobody would ever answer them. There sessions read from a second open file of the connection
//!   (FUSE_DEV_IOC_CLONE), which goes with the process, and with it the kernel ends what was read there: ECONNABORTED. The
//!   page cache asks again for pages that it did not get, so most readers do not see it.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use fuser::{Config, Session};
use rustix::io::{DupFlags, dup3};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use zerocopy::IntoBytes;

use super::init::{Agreement, MAX_BYTES, ReplyHeader};
use crate::fs::ImageFs;

/// Room that the kernel wants for a request before it says INIT (FUSE_MIN_READ_BUFFER), though that takes little of it.
const FIRST_READ: usize = 8192;
/// FUSE_NOTIFY_RESEND.
const RESEND: i32 = 7;
/// FUSE_DEV_IOC_CLONE: `_IOR(229, 0, uint32_t)`.
const CLONE: Opcode = opcode::read::<u32>(229, 0);

/// Opens the session of a mount that was just made over `device`.
pub(super) fn open(fs: ImageFs, device: &OwnedFd, config: Config) -> io::Result<(Session<ImageFs>, Agreement)> {
    let mut request = vec![0; FIRST_READ];
    let len = rustix::io::retry_on_intr(|| rustix::io::read(device, &mut request))?;
    request.truncate(len);
    let (session, reply) = introduce(fs, &request, config)?;
    let agreement = Agreement::of(&request, &reply);
    let agreement = agreement.ok_or_else(|| io::Error::other("the kernel begins with something else than INIT"))?;
    rustix::io::write(device, &reply)?;
    attach(&session, device, agreement)?;
    Ok((session, agreement))
}

/// Goes on with the session over `device`. Nobody else may serve it any more.
pub(super) fn resume(
    fs: ImageFs,
    device: &OwnedFd,
    agreement: Agreement,
    config: Config,
) -> io::Result<Session<ImageFs>> {
    let (session, _) = introduce(fs, &agreement.request(), config)?;
    if agreement.resend {
        let notice = ReplyHeader { len: size_of::<ReplyHeader>() as u32, error: RESEND, unique: 0 };
        rustix::io::write(device, notice.as_bytes())?;
    } else {
        tracing::warn!("this kernel cannot repeat requests: what was asked last has failed with ECONNABORTED");
    }
    attach(&session, device, agreement)?;
    Ok(session)
}

/// A session that has heard INIT, and its answer.
fn introduce(fs: ImageFs, request: &[u8], config: Config) -> io::Result<(Session<ImageFs>, Vec<u8>)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::write(&ours, request)?;
    // Should the session wait for more, it hears that there is none.
    shutdown(&ours, Shutdown::Write)?;
    let acl = config.acl;
    let session = Session::from_fd(fs, theirs, acl, config)?;
    let mut reply = vec![0; MAX_BYTES];
    let len = rustix::io::read(&ours, &mut reply)?;
    reply.truncate(len);
    Ok((session, reply))
}

/// Puts the device in the place of the socket that the session has heard INIT on.
fn attach(session: &Session<ImageFs>, device: &OwnedFd, agreement: Agreement) -> io::Result<()> {
    let clone = if agreement.resend { None } else { Some(second(device)?) };
    // SAFETY: the number is open, since the session owns it and is borrowed here; `ManuallyDrop` leaves closing it to the
    // session. What is open under it is meant to change: nothing has been read or written through it but INIT.
    let mut number = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(session.as_fd().as_raw_fd()) });
    Ok(dup3(clone.as_ref().unwrap_or(device), &mut number, DupFlags::CLOEXEC)?)
}

/// A second open file of the device's connection: requests that were read from it end when it is closed.
fn second(device: &OwnedFd) -> io::Result<OwnedFd> {
    let clone = File::options().read(true).write(true).open("/dev/fuse")?;
    // SAFETY: FUSE_DEV_IOC_CLONE takes a pointer to a descriptor's number, a u32, and only reads it.
    unsafe { ioctl(&clone, Setter::<CLONE, u32>::new(device.as_raw_fd() as u32))? };
    Ok(clone.into())
}

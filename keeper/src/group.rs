//! A fanotify group of pre-content events (Linux 6.15 and later): before the kernel reads a range of a marked file it asks
//! whoever reads the group, and waits for the answer.
//!
//! What was found out about it, and is relied on here:
//!
//! - The group is an open file that processes can share. When the last of them closes it, readers that wait go on, and later ones
//!   are not asked: they see the file as it is, holes as zeros.
//! - An answer names an event by the number of the descriptor that came with it *in the process that has read it*. So a group has one
//!   reader at a time: with two of them the same number could mean two events. A new reader first has everything denied
//!   that another may have left unanswered, see [`Group::settle`].
//! - The descriptor of an event raises no events itself, whoever uses it.
//! - A file that was opened while nobody had a mark on it raises no events for as long as it is open; one that was opened with a
//!   mark asks again whenever there is a mark, also one of another group.
//! - When more events come than a queue may hold the kernel lets the readers go on. So the queue must have no limit.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// Most descriptors of a process that reads a group, and thereby the numbers that its events can have. It limits itself to that.
pub const MAX_DESCRIPTORS: u32 = 1 << 14;

/// `FAN_PRE_ACCESS` of linux/fanotify.h.
const PRE_ACCESS: u64 = 0x0010_0000;
/// `FAN_EVENT_INFO_TYPE_RANGE`: type and length (4 bytes), padding (4), offset (8), count (8).
const INFO_RANGE: u8 = 6;
const INFO_RANGE_LEN: usize = 24;
/// Bytes that are read of the group at once: room for hundreds of events, of which far fewer wait.
const READ_BYTES: usize = 4096;
const METADATA_LEN: usize = size_of::<libc::fanotify_event_metadata>();

/// What a reader is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on: the range is in the file.
    Allow,
    /// The read ends with EIO, unless the kernel read ahead; then it asks again when somebody wants the bytes.
    Deny,
}

/// Somebody is about to read a range of a marked file, and waits.
#[derive(Debug)]
pub struct Event {
    /// The file, open for reading and writing. What is done with it raises no events.
    pub file: OwnedFd,
    /// First byte that is about to be read.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// A group of pre-content events.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// Makes a group without marks.
    ///
    /// # Errors
    /// The kernel is too old, or this process not privileged (`CAP_SYS_ADMIN`).
    pub fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS;
        let files = (libc::O_RDWR | libc::O_CLOEXEC | libc::O_LARGEFILE) as libc::c_uint;
        // SAFETY: it takes no pointers, and what it returns is a descriptor that nobody else has.
        let made = unsafe { libc::fanotify_init(flags, files) };
        // SAFETY: see above.
        check(made).map(|fd| Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// From now on reads of this file ask; said twice it does no harm. The file itself stays marked, not only this
    /// descriptor, until it is deleted and closed everywhere.
    ///
    /// # Errors
    /// Its file system raises no such events.
    pub fn mark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change(libc::FAN_MARK_ADD, file)
    }

    /// From now on they do not. That they did not before is no error.
    ///
    /// # Errors
    /// What the system says.
    pub fn unmark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        match self.change(libc::FAN_MARK_REMOVE, file) {
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(()),
            outcome => outcome,
        }
    }

    fn change(&self, what: libc::c_uint, file: BorrowedFd<'_>) -> io::Result<()> {
        let (group, file) = (self.0.as_raw_fd(), file.as_raw_fd());
        // SAFETY: both descriptors are open as long as they are borrowed; without a path the call looks at the file itself.
        check(unsafe { libc::fanotify_mark(group, what, PRE_ACCESS, file, std::ptr::null()) }).map(drop)
    }

    /// Events that have come since; none if there are none. They are to be [answered](Self::answer) by the numbers of their
    /// descriptors, in this process. For the only reader of the group.
    ///
    /// # Errors
    /// What the system says. An event of which no descriptor could be made is denied by the kernel.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        let mut bytes = [0; READ_BYTES];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut bytes)) {
            Ok(len) => Ok(events(&bytes[..len])),
            Err(Errno::AGAIN) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Lets the reader go on, or not, whose event had a descriptor of this number.
    ///
    /// # Errors
    /// `NotFound` if there is no such event, for instance because its reader was killed.
    pub fn answer(&self, number: RawFd, verdict: Verdict) -> io::Result<()> {
        let response = match verdict {
            Verdict::Allow => libc::FAN_ALLOW,
            // FAN_DENY_ERRNO of linux/fanotify.h.
            Verdict::Deny => libc::FAN_DENY | (Errno::IO.raw_os_error() as u32) << 24,
        };
        let response = [number.to_ne_bytes(), response.to_ne_bytes()].concat();
        rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &response))?;
        Ok(())
    }

    /// The inodes that have a mark of this group, as the kernel tells of its descriptor: `fanotify ino:INODE sdev:..` in
    /// hexadecimal.
    ///
    /// # Errors
    /// There is no proc(5).
    pub fn marked(&self) -> io::Result<Vec<u64>> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        Ok(text.lines().filter_map(inode_of_mark).collect())
    }

    /// Denies whatever another process has read of the group and not answered. To be called by a new reader, before it reads; gives
    /// how many events there were.
    pub fn settle(&self) -> usize {
        (0..MAX_DESCRIPTORS as RawFd).filter(|number| self.answer(*number, Verdict::Deny).is_ok()).count()
    }
}

impl From<OwnedFd> for Group {
    /// Another copy of a group's descriptor.
    fn from(copy: OwnedFd) -> Self {
        Self(copy)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The events in what the kernel has written. Descriptors of records that are not understood are closed, which answers
/// nothing: [`Group::settle`] does.
fn events(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    // SAFETY: the kernel writes whole records of this layout, of which any bytes are a valid value; see fanotify(7).
    while let Some(metadata) = (bytes.len() >= METADATA_LEN)
        .then(|| unsafe { bytes.as_ptr().cast::<libc::fanotify_event_metadata>().read_unaligned() })
    {
        let (len, head) = (metadata.event_len as usize, usize::from(metadata.metadata_len));
        if len < METADATA_LEN || len > bytes.len() {
            break;
        }
        let infos = bytes[..len].get(head..).unwrap_or_default();
        bytes = &bytes[len..];
        if metadata.fd < 0 {
            continue;
        }
        // SAFETY: the kernel has just made it for this process, and nothing else knows of it.
        let file = unsafe { OwnedFd::from_raw_fd(metadata.fd) };
        // An event without a range is about all of the file.
        let (offset, len) = range(infos).unwrap_or((0, u64::MAX));
        events.push(Event { file, offset, len });
    }
    events
}

/// Offset and length in the records behind an event.
fn range(mut infos: &[u8]) -> Option<(u64, u64)> {
    while let [kind, _, len @ ..] = infos {
        let len = usize::from(u16::from_ne_bytes(*len.first_chunk()?));
        let (record, rest) = infos.split_at_checked(len).filter(|_| len >= 4)?;
        if *kind == INFO_RANGE && len >= INFO_RANGE_LEN {
            let number = |at: usize| Some(u64::from_ne_bytes(*record.get(at..)?.first_chunk()?));
            return Some((number(8)?, number(16)?));
        }
        infos = rest;
    }
    None
}

fn inode_of_mark(line: &str) -> Option<u64> {
    let inode = line.strip_prefix("fanotify ino:")?.split(' ').next()?;
    u64::from_str_radix(inode, 16).ok()
}

fn check(outcome: libc::c_int) -> io::Result<libc::c_int> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_from_the_other_lines() {
        let text = "pos:\t0\nflags:\t02004002\nfanotify flags:3b event-flags:88002\n\
            fanotify ino:4f969 sdev:800013 mflags:0 mask:100000 ignored_mask:0 fhandle-bytes:8\n";
        assert_eq!(text.lines().filter_map(inode_of_mark).collect::<Vec<_>>(), [0x4f969]);
    }

    #[test]
    fn a_range_is_found_behind_other_records_and_nothing_in_what_is_cut_off() {
        let mut infos = vec![4, 0, 8, 0, 1, 2, 3, 4];
        infos.extend([INFO_RANGE, 0, 24, 0, 0, 0, 0, 0]);
        infos.extend(4096u64.to_ne_bytes());
        infos.extend(100u64.to_ne_bytes());
        assert_eq!(range(&infos), Some((4096, 100)));
        assert_eq!(
            [range(&infos[..infos.len() - 1]), range(&infos[..7]), range(&[6, 0, 0, 0]), range(&[])],
            [None; 4]
        );
    }
}

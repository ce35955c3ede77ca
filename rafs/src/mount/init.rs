//! The first exchange of a FUSE session, INIT, as bytes: `struct fuse_init_in` and `fuse_init_out` of the kernel's
//! `include/uapi/linux/fuse.h`, in the byte order of the machine.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// FUSE_INIT.
const OPCODE: u32 = 26;
/// FUSE_INIT_EXT: there are flags in the upper half, too.
const EXTENDED: u64 = 1 << 30;
/// FUSE_HAS_RESEND: the kernel sends requests again that were read and not answered. Since Linux 6.9.
const RESEND: u64 = 1 << 39;

/// More than an INIT takes in either direction.
pub(super) const MAX_BYTES: usize = 256;

/// In front of every request.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RequestHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    extension_len: u16,
    padding: u16,
}

/// In front of every reply.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ReplyHeader {
    /// Bytes of the reply, with this header.
    pub(super) len: u32,
    /// 0, or an error number below it; of a notice that answers nothing, its code.
    pub(super) error: i32,
    /// Which request is answered; 0 for a notice.
    pub(super) unique: u64,
}

/// What the kernel offers. Kernels before 5.17 end it behind `flags`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Offer {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    upper_flags: u32,
    unused: [u32; 11],
}

/// The part of the reply that says what is taken of the offer.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Taken {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_granularity: u32,
    max_pages: u16,
    map_alignment: u16,
    upper_flags: u32,
}

/// What kernel and session have agreed on: the kernel goes by it as long as the mount lives, whoever serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Agreement {
    /// The kernel's version of the protocol.
    version: (u32, u32),
    /// How far it offers to read ahead, in bytes.
    max_readahead: u32,
    /// What both sides can.
    flags: u64,
    /// Whether the kernel sends requests again that were read and not answered.
    pub(super) resend: bool,
}

impl Agreement {
    /// What `reply` makes of `request`; none if one of them is not what it should be.
    pub(super) fn of(request: &[u8], reply: &[u8]) -> Option<Self> {
        let (header, body) = RequestHeader::read_from_prefix(request).ok()?;
        let mut offer = Offer::new_zeroed();
        let known = body.len().min(size_of::<Offer>());
        offer.as_mut_bytes()[..known].copy_from_slice(&body[..known]);
        let (answer, body) = ReplyHeader::read_from_prefix(reply).ok()?;
        let (taken, _) = Taken::read_from_prefix(body).ok()?;
        let fits = header.opcode == OPCODE && answer.unique == header.unique && answer.error == 0;
        let offered = joined(offer.flags, offer.upper_flags);
        fits.then_some(Self {
            version: (offer.major, offer.minor),
            max_readahead: offer.max_readahead,
            flags: offered & joined(taken.flags, taken.upper_flags),
            resend: offered & RESEND != 0,
        })
    }

    /// An INIT request that offers just what was agreed.
    pub(super) fn request(&self) -> Vec<u8> {
        let len = size_of::<RequestHeader>() + size_of::<Offer>();
        let header = RequestHeader { len: len as u32, opcode: OPCODE, unique: 2, ..RequestHeader::new_zeroed() };
        let offer = Offer {
            major: self.version.0,
            minor: self.version.1,
            max_readahead: self.max_readahead,
            flags: self.flags as u32,
            upper_flags: (self.flags >> 32) as u32,
            unused: [0; 11],
        };
        [header.as_bytes(), offer.as_bytes()].concat()
    }
}

/// The upper half counts only if the lower one says so.
fn joined(flags: u32, upper: u32) -> u64 {
    let flags = u64::from(flags);
    if flags & EXTENDED == 0 { flags } else { flags | u64::from(upper) << 32 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reply(unique: u64, error: i32, flags: u64) -> Vec<u8> {
        let len = size_of::<ReplyHeader>() + size_of::<Taken>();
        let taken = Taken { flags: flags as u32, upper_flags: (flags >> 32) as u32, ..Taken::new_zeroed() };
        [ReplyHeader { len: len as u32, error, unique }.as_bytes(), taken.as_bytes()].concat()
    }

    proptest! {
        #[test]
        fn what_was_agreed_is_offered_and_agreed_again(offered: u64, taken: u64) {
            let kernel = Agreement { version: (7, 41), max_readahead: 1 << 17, flags: offered, resend: false };
            let agreed = Agreement::of(&kernel.request(), &reply(2, 0, taken)).unwrap();
            let visible = |flags| joined(flags as u32, (flags >> 32) as u32);
            prop_assert_eq!(agreed.flags, visible(offered) & visible(taken));
            prop_assert_eq!(agreed.resend, visible(offered) & RESEND != 0);
            let again = Agreement::of(&agreed.request(), &reply(2, 0, u64::MAX)).unwrap();
            prop_assert_eq!((again.flags, again.version), (agreed.flags, agreed.version));
        }

        #[test]
        fn any_bytes_are_an_agreement_or_none(request: Vec<u8>, reply: Vec<u8>) {
            let _ = Agreement::of(&request, &reply);
        }
    }

    #[test]
    fn an_old_kernel_ends_its_offer_early_and_a_refusal_is_no_agreement() {
        let agreement = Agreement { version: (7, 31), max_readahead: 1, flags: 0b11, resend: false };
        let request = agreement.request();
        let short = &request[..size_of::<RequestHeader>() + 16];
        assert_eq!(Agreement::of(short, &reply(2, 0, 0b10)).unwrap().flags, 0b10);
        assert_eq!(Agreement::of(short, &reply(2, -71, 0b10)), None);
        assert_eq!(Agreement::of(short, &reply(4, 0, 0b10)), None);
        assert_eq!(Agreement::of(&request[..8], &reply(2, 0, 0b10)), None);
    }
}

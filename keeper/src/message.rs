//! Messages as bytes. A message has one form: what can be read is written again as it was.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Version of the protocol, the first byte of every packet.
pub const VERSION: u8 = 1;
/// Most bytes of a device number as text.
pub const MAX_DEVICE: usize = 32;
/// Most bytes of a mountpoint.
pub const MAX_PATH: usize = 4096;
/// Most bytes of a record.
pub const MAX_RECORD: usize = 4096;
/// Most bytes of the reason of a refusal.
pub const MAX_REASON: usize = 256;
/// Most bytes of a packet: version, kind, and the largest message, that of a mount.
pub const MAX_PACKET: usize = 2 + 3 * 2 + MAX_DEVICE + MAX_PATH + MAX_RECORD;

/// What is known of a mount besides its connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `MAJOR:MINOR` of the device number: its name here, since it is unique as long as the mount lives. Up to
    /// [`MAX_DEVICE`] bytes.
    pub device: String,
    /// Where it was mounted: an absolute path of up to [`MAX_PATH`] bytes.
    pub mountpoint: PathBuf,
    /// What the daemon wants to know of it, up to [`MAX_RECORD`] bytes.
    pub record: Vec<u8>,
}

/// From a daemon to the keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Keep this mount, in place of what had its device number. The packet carries the connection.
    Keep(Mount),
    /// Tell of the mount with the next device number in the order of texts.
    Next {
        /// The one that was told of last; empty to begin.
        after: String,
    },
    /// Close the connection of a mount.
    Forget {
        /// Its device number.
        device: String,
    },
    /// Hold this group of events and read it from now on; what another reader has left unanswered is denied. The packet
    /// carries the group. There is one at most.
    Guard,
    /// Give a copy of the group.
    Group,
    /// Let go of the group: nothing is marked any more.
    Release,
    /// From now on tell of the group's events over this connection, in place of another one, and take [answers](Self::Answer)
    /// over it, and nothing else.
    Take,
    /// An event has been dealt with. Has no reply.
    Answer {
        /// Which.
        id: u64,
        /// Whether its reader may go on.
        allow: bool,
    },
    /// End, if nothing is kept and no group is held.
    Stop,
}

/// From the keeper to a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// It was not.
    Refused {
        /// Why, in up to [`MAX_REASON`] bytes.
        reason: String,
    },
    /// A mount that is kept. The packet carries the connection.
    Kept(Mount),
    /// The group. The packet carries it.
    Group,
    /// There are no more, or there is none.
    End,
    /// Somebody waits to read a range of a marked file. The packet carries the file.
    Event {
        /// What the answer names it by; never that of another event of this keeper.
        id: u64,
        /// The number of the file's descriptor in the keeper.
        number: u64,
        /// First byte that is about to be read.
        offset: u64,
        /// How many.
        len: u64,
    },
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another version.
    #[error("version {0} of the keeper's protocol, where {VERSION} is spoken")]
    Version(u8),
    /// A kind that does not exist.
    #[error("message of unknown kind {0}")]
    Kind(u8),
    /// A field that is not there in full.
    #[error("the {0} is cut off")]
    CutOff(&'static str),
    /// A field that is too long, not text, not a number, or a path that is not absolute.
    #[error("the {0} is not one")]
    Field(&'static str),
    /// Bytes behind the last field.
    #[error("{0} bytes too many")]
    TooLong(usize),
}

impl Request {
    /// Reads a packet.
    ///
    /// # Errors
    /// It is no request.
    pub fn decode(packet: &[u8]) -> Result<Self, Malformed> {
        let (kind, mut fields) = open(packet)?;
        let request = match kind {
            b'K' => Self::Keep(fields.mount()?),
            b'N' => Self::Next { after: fields.text("device", MAX_DEVICE)? },
            b'F' => Self::Forget { device: fields.text("device", MAX_DEVICE)? },
            b'G' => Self::Guard,
            b'C' => Self::Group,
            b'R' => Self::Release,
            b'T' => Self::Take,
            b'A' => Self::Answer { id: fields.number("id")?, allow: fields.flag("answer")? },
            b'S' => Self::Stop,
            other => return Err(Malformed::Kind(other)),
        };
        fields.end(request)
    }

    /// The packet. Fields must keep to their limits, or the other side refuses them.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Keep(mount) => encode_mount(b'K', mount),
            Self::Next { after } => packet(b'N', &[after.as_bytes()]),
            Self::Forget { device } => packet(b'F', &[device.as_bytes()]),
            Self::Guard => packet(b'G', &[]),
            Self::Group => packet(b'C', &[]),
            Self::Release => packet(b'R', &[]),
            Self::Take => packet(b'T', &[]),
            Self::Answer { id, allow } => packet(b'A', &[&id.to_le_bytes(), &[u8::from(*allow)]]),
            Self::Stop => packet(b'S', &[]),
        }
    }
}

impl Reply {
    /// Reads a packet.
    ///
    /// # Errors
    /// It is no reply.
    pub fn decode(packet: &[u8]) -> Result<Self, Malformed> {
        let (kind, mut fields) = open(packet)?;
        let reply = match kind {
            b'd' => Self::Done,
            b'r' => Self::Refused { reason: fields.text("reason", MAX_REASON)? },
            b'k' => Self::Kept(fields.mount()?),
            b'g' => Self::Group,
            b'e' => Self::End,
            b'v' => Self::Event {
                id: fields.number("id")?,
                number: fields.number("number")?,
                offset: fields.number("offset")?,
                len: fields.number("length")?,
            },
            other => return Err(Malformed::Kind(other)),
        };
        fields.end(reply)
    }

    /// The packet. Fields must keep to their limits, or the other side refuses them.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Done => packet(b'd', &[]),
            Self::Refused { reason } => packet(b'r', &[reason.as_bytes()]),
            Self::Kept(mount) => encode_mount(b'k', mount),
            Self::Group => packet(b'g', &[]),
            Self::End => packet(b'e', &[]),
            Self::Event { id, number, offset, len } => {
                let fields = [id, number, offset, len].map(|number| number.to_le_bytes());
                packet(b'v', &fields.each_ref().map(|field| field.as_slice()))
            }
        }
    }
}

fn packet(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = vec![VERSION, kind];
    for field in fields {
        // What is longer than its limit, which is less than this, is refused whatever length it claims to have.
        let len = u16::try_from(field.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(field);
    }
    bytes
}

fn encode_mount(kind: u8, mount: &Mount) -> Vec<u8> {
    packet(kind, &[mount.device.as_bytes(), mount.mountpoint.as_os_str().as_bytes(), &mount.record])
}

fn open(packet: &[u8]) -> Result<(u8, Fields<'_>), Malformed> {
    match packet {
        [VERSION, kind, rest @ ..] => Ok((*kind, Fields(rest))),
        [VERSION] | [] => Err(Malformed::CutOff("message")),
        [version, ..] => Err(Malformed::Version(*version)),
    }
}

/// What has not been read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn field(&mut self, name: &'static str, limit: usize) -> Result<&'a [u8], Malformed> {
        let (len, rest) = self.0.split_first_chunk().ok_or(Malformed::CutOff(name))?;
        let len = usize::from(u16::from_le_bytes(*len));
        let (field, rest) = rest.split_at_checked(len).ok_or(Malformed::CutOff(name))?;
        self.0 = rest;
        if len > limit { Err(Malformed::Field(name)) } else { Ok(field) }
    }

    fn text(&mut self, name: &'static str, limit: usize) -> Result<String, Malformed> {
        let field = self.field(name, limit)?;
        std::str::from_utf8(field).map(str::to_owned).map_err(|_| Malformed::Field(name))
    }

    fn number(&mut self, name: &'static str) -> Result<u64, Malformed> {
        let field = self.field(name, 8)?;
        Ok(u64::from_le_bytes(field.try_into().map_err(|_| Malformed::Field(name))?))
    }

    fn flag(&mut self, name: &'static str) -> Result<bool, Malformed> {
        match self.field(name, 1)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed::Field(name)),
        }
    }

    fn mount(&mut self) -> Result<Mount, Malformed> {
        let device = self.text("device", MAX_DEVICE)?;
        let path = self.field("mountpoint", MAX_PATH)?;
        let mountpoint = PathBuf::from(OsString::from_vec(path.to_vec()));
        let record = self.field("record", MAX_RECORD)?.to_vec();
        if device.is_empty() {
            return Err(Malformed::Field("device"));
        }
        if !Path::is_absolute(&mountpoint) || path.contains(&0) {
            return Err(Malformed::Field("mountpoint"));
        }
        Ok(Mount { device, mountpoint, record })
    }

    fn end<T>(&self, message: T) -> Result<T, Malformed> {
        if self.0.is_empty() { Ok(message) } else { Err(Malformed::TooLong(self.0.len())) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn mount() -> impl Strategy<Value = Mount> {
        ("[0-9]{1,4}:[0-9]{1,20}", vec(1u8.., 0..100), vec(any::<u8>(), 0..200)).prop_map(|(device, path, record)| {
            let path = [b"/", path.as_slice()].concat();
            Mount { device, mountpoint: OsString::from_vec(path).into(), record }
        })
    }

    proptest! {
        #[test]
        fn messages_come_back_as_they_were(mount in mount(), text in "\\PC{0,8}", id: u64, len: u64, allow: bool) {
            let requests = [
                Request::Keep(mount.clone()),
                Request::Next { after: text.clone() },
                Request::Forget { device: text.clone() },
                Request::Guard,
                Request::Group,
                Request::Release,
                Request::Take,
                Request::Answer { id, allow },
                Request::Stop,
            ];
            for request in requests {
                prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
            }
            let event = Reply::Event { id, number: 7, offset: 4096, len };
            let replies = [Reply::Done, Reply::Refused { reason: text }, Reply::Kept(mount), Reply::End, Reply::Group, event];
            for reply in replies {
                prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
            }
        }

        #[test]
        fn a_message_cut_short_or_with_more_behind_it_is_none(mount in mount(), cut: prop::sample::Index) {
            let packet = Request::Keep(mount).encode();
            prop_assert!(Request::decode(&packet[..cut.index(packet.len())]).is_err());
            prop_assert_eq!(Request::decode(&[packet, vec![0]].concat()), Err(Malformed::TooLong(1)));
        }
    }

    #[test]
    fn the_largest_mount_fits_a_packet_and_a_larger_one_is_refused() {
        let of = |device: usize, path: usize, record: usize| Mount {
            device: "9".repeat(device),
            mountpoint: format!("/{}", "a".repeat(path - 1)).into(),
            record: vec![7; record],
        };
        let largest = Request::Keep(of(MAX_DEVICE, MAX_PATH, MAX_RECORD));
        assert_eq!(largest.encode().len(), MAX_PACKET);
        assert_eq!(Request::decode(&largest.encode()), Ok(largest));
        for (mount, field) in [
            (of(MAX_DEVICE + 1, 1, 0), "device"),
            (of(1, MAX_PATH + 1, 0), "mountpoint"),
            (of(1, 1, MAX_RECORD + 1), "record"),
            (Mount { mountpoint: "a".into(), ..of(1, 1, 0) }, "mountpoint"),
            (Mount { device: String::new(), ..of(1, 1, 0) }, "device"),
        ] {
            assert_eq!(Request::decode(&Request::Keep(mount).encode()), Err(Malformed::Field(field)));
        }
        assert!(Request::decode(&Request::Keep(of(1, 1, 1 << 17)).encode()).is_err());
    }

    #[test]
    fn another_version_and_another_kind_are_named() {
        assert_eq!(Request::decode(&[2, b'S']), Err(Malformed::Version(2)));
        assert_eq!(Request::decode(&[VERSION, b'd']), Err(Malformed::Kind(b'd')));
        assert_eq!(Reply::decode(&[]), Err(Malformed::CutOff("message")));
    }
}

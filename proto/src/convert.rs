//! Generated messages to domain types and back: every check on remote input is here.
//!
//! The way out is checked too, so that a bug shows where it is rather than as a refusal at the other end.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{
    Bitfield, BitfieldError, IdError, MAX_PAYLOAD, MAX_WIRE_PIECES, PeerId, Priority, Role, StartTrace,
    StartTraceError,
    generated::wire::{self, header, request},
    message::*,
};

/// Which limit a message breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A field that must be there is not, or has a value that this version does not know.
    #[error("{0} is missing or unknown")]
    Missing(&'static str),
    /// A field or list is too long, or a number too large.
    #[error("{what} is {found}, at most {limit} allowed")]
    TooLarge {
        /// Which field.
        what: &'static str,
        /// Its size or value.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// An address that is not one.
    #[error("an address of {ip} bytes and port {port}")]
    Address {
        /// Bytes of the address.
        ip: usize,
        /// Port number.
        port: u32,
    },
    /// The oldest version is newer than the newest, or zero.
    #[error("versions from {min_version} to {version}")]
    Versions {
        /// Oldest.
        min_version: u32,
        /// Newest.
        version: u32,
    },
    /// The parts of an answer do not fit in its total, or an empty part of one that is not empty.
    #[error("a part of {length} bytes at {offset} of {total}")]
    Part {
        /// Bytes of the part.
        length: u32,
        /// Where it starts.
        offset: u64,
        /// Bytes of the whole.
        total: u64,
    },
    /// An identity of the wrong length.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A bitfield that is none.
    #[error(transparent)]
    Bitfield(#[from] BitfieldError),
    /// A trace that is none.
    #[error(transparent)]
    StartTrace(#[from] StartTraceError),
}

type Result<T, E = ConvertError> = std::result::Result<T, E>;

fn within(what: &'static str, found: u64, limit: u64) -> Result<()> {
    if found > limit { Err(ConvertError::TooLarge { what, found, limit }) } else { Ok(()) }
}

fn short(what: &'static str, found: usize, limit: usize) -> Result<()> {
    within(what, found as u64, limit as u64)
}

fn millis(duration: Duration) -> u32 {
    duration.min(MAX_WAIT).as_millis() as u32
}

fn duration(millis: u32) -> Duration {
    Duration::from_millis(millis.into()).min(MAX_WAIT)
}

impl TryFrom<wire::Header> for Message {
    type Error = ConvertError;

    fn try_from(header: wire::Header) -> Result<Self> {
        use header::Message as Wire;
        Ok(match header.message.ok_or(ConvertError::Missing("message"))? {
            Wire::Hello(hello) => Self::Hello(hello.try_into()?),
            Wire::Request(request) => Self::Request(request.try_into()?),
            Wire::Data(data) => Self::Data(checked_data(Data {
                request: data.request,
                piece: data.piece,
                total: data.total,
                offset: data.offset,
                length: data.length,
            })?),
            Wire::NotHave(answer) => Self::NotHave { request: answer.request, piece: answer.piece },
            Wire::Pending(answer) => Self::Pending { request: answer.request, eta: duration(answer.eta_ms) },
            Wire::Busy(answer) => Self::Busy {
                request: answer.request,
                retry_after: duration(answer.retry_after_ms),
                alternates: contacts(answer.alternates)?,
            },
            Wire::NotMyHome(answer) => {
                short("members", answer.members.len(), MAX_CONTACTS)?;
                let members = answer.members.iter().map(|id| PeerId::try_from(&id[..])).collect::<Result<_, _>>()?;
                Self::NotMyHome { request: answer.request, members }
            }
            Wire::CannotSource(answer) => {
                short("reason", answer.reason.len(), MAX_REASON)?;
                Self::CannotSource { request: answer.request, reason: answer.reason }
            }
            Wire::End(answer) => Self::End { request: answer.request, status: status(answer.status())? },
            Wire::Cancel(cancel) => Self::Cancel { request: cancel.request },
            Wire::Have(have) => Self::Have(have.try_into()?),
            Wire::Interest(interest) => {
                Self::Interest { bootstrap: interest.bootstrap[..].try_into()?, blob: interest.blob[..].try_into()? }
            }
            Wire::Peers(peers) => {
                Self::Peers { blob: peers.blob[..].try_into()?, contacts: contacts(peers.contacts)? }
            }
            Wire::Trace(trace) => {
                Self::Trace { bootstrap: trace.bootstrap[..].try_into()?, trace: StartTrace::parse(&trace.pieces)? }
            }
            Wire::Close(close) => {
                short("reason", close.reason.len(), MAX_REASON)?;
                Self::Close { code: close.code, reason: close.reason }
            }
        })
    }
}

impl TryFrom<&Message> for wire::Header {
    type Error = ConvertError;

    fn try_from(message: &Message) -> Result<Self> {
        use header::Message as Wire;
        let message = match message {
            Message::Hello(hello) => Wire::Hello(hello.try_into()?),
            Message::Request(request) => Wire::Request(request.try_into()?),
            Message::Data(data) => {
                let Data { request, piece, total, offset, length } = checked_data(*data)?;
                Wire::Data(wire::Data { request, piece, total, offset, length })
            }
            &Message::NotHave { request, piece } => Wire::NotHave(wire::NotHave { request, piece }),
            &Message::Pending { request, eta } => Wire::Pending(wire::Pending { request, eta_ms: millis(eta) }),
            Message::Busy { request, retry_after, alternates } => Wire::Busy(wire::Busy {
                request: *request,
                retry_after_ms: millis(*retry_after),
                alternates: wire_contacts(alternates)?,
            }),
            Message::NotMyHome { request, members } => {
                short("members", members.len(), MAX_CONTACTS)?;
                let members = members.iter().map(|id| id.as_bytes().to_vec()).collect();
                Wire::NotMyHome(wire::NotMyHome { request: *request, members })
            }
            Message::CannotSource { request, reason } => {
                short("reason", reason.len(), MAX_REASON)?;
                Wire::CannotSource(wire::CannotSource { request: *request, reason: reason.clone() })
            }
            &Message::End { request, status } => Wire::End(wire::End { request, status: wire_status(status).into() }),
            &Message::Cancel { request } => Wire::Cancel(wire::Cancel { request }),
            Message::Have(have) => Wire::Have(have.try_into()?),
            Message::Interest { bootstrap, blob } => Wire::Interest(wire::Interest {
                bootstrap: bootstrap.as_bytes().to_vec(),
                blob: blob.as_bytes().to_vec(),
            }),
            Message::Peers { blob, contacts } => {
                Wire::Peers(wire::Peers { blob: blob.as_bytes().to_vec(), contacts: wire_contacts(contacts)? })
            }
            Message::Trace { bootstrap, trace } => {
                Wire::Trace(wire::Trace { bootstrap: bootstrap.as_bytes().to_vec(), pieces: trace.encode() })
            }
            Message::Close { code, reason } => {
                short("reason", reason.len(), MAX_REASON)?;
                Wire::Close(wire::Close { code: *code, reason: reason.clone() })
            }
        };
        Ok(Self { message: Some(message) })
    }
}

fn checked_data(data: Data) -> Result<Data> {
    let Data { total, offset, length, .. } = data;
    within("total", total, MAX_ANSWER)?;
    short("length", length as usize, MAX_PAYLOAD)?;
    let fits = offset.checked_add(length.into()).is_some_and(|end| end <= total);
    if fits && (length > 0 || total == 0) { Ok(data) } else { Err(ConvertError::Part { length, offset, total }) }
}

fn status(status: wire::Status) -> Result<Status> {
    match status {
        wire::Status::Unspecified => Err(ConvertError::Missing("status")),
        wire::Status::Complete => Ok(Status::Complete),
        wire::Status::Cancelled => Ok(Status::Cancelled),
        wire::Status::Failed => Ok(Status::Failed),
        wire::Status::Refused => Ok(Status::Refused),
    }
}

fn wire_status(status: Status) -> wire::Status {
    match status {
        Status::Complete => wire::Status::Complete,
        Status::Cancelled => wire::Status::Cancelled,
        Status::Failed => wire::Status::Failed,
        Status::Refused => wire::Status::Refused,
    }
}

fn addresses(wire: Vec<wire::Address>) -> Result<Vec<SocketAddr>> {
    short("addresses", wire.len(), MAX_ADDRESSES)?;
    wire.into_iter().map(address).collect()
}

fn address(wire: wire::Address) -> Result<SocketAddr> {
    let ip = <[u8; 4]>::try_from(&wire.ip[..])
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(&wire.ip[..]).map(IpAddr::from))
        .ok();
    let port = u16::try_from(wire.port).ok().filter(|&port| port != 0);
    match (ip, port) {
        (Some(ip), Some(port)) => Ok(SocketAddr::new(ip, port)),
        _ => Err(ConvertError::Address { ip: wire.ip.len(), port: wire.port }),
    }
}

fn wire_addresses(addresses: &[SocketAddr]) -> Result<Vec<wire::Address>> {
    short("addresses", addresses.len(), MAX_ADDRESSES)?;
    addresses.iter().map(wire_address).collect()
}

fn wire_address(address: &SocketAddr) -> Result<wire::Address> {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let port = address.port().into();
    if port == 0 { Err(ConvertError::Address { ip: ip.len(), port }) } else { Ok(wire::Address { ip, port }) }
}

fn contacts(wire: Vec<wire::Contact>) -> Result<Vec<Contact>> {
    short("contacts", wire.len(), MAX_CONTACTS)?;
    let contact = |contact: wire::Contact| {
        Ok(Contact { peer: contact.peer[..].try_into()?, addresses: addresses(contact.addresses)? })
    };
    wire.into_iter().map(contact).collect()
}

fn wire_contacts(contacts: &[Contact]) -> Result<Vec<wire::Contact>> {
    short("contacts", contacts.len(), MAX_CONTACTS)?;
    let contact = |contact: &Contact| {
        Ok(wire::Contact { peer: contact.peer.as_bytes().to_vec(), addresses: wire_addresses(&contact.addresses)? })
    };
    contacts.iter().map(contact).collect()
}

fn checked_hello(hello: Hello) -> Result<Hello> {
    let Hello { version, min_version, .. } = hello;
    if min_version == 0 || min_version > version {
        return Err(ConvertError::Versions { min_version, version });
    }
    short("membership", hello.membership.len(), MAX_MEMBERSHIP)?;
    short("zone", hello.zone.len(), MAX_NAME)?;
    short("name", hello.name.len(), MAX_NAME)?;
    short("labels", hello.labels.len(), MAX_LABELS)?;
    for (key, value) in &hello.labels {
        short("label", key.len().max(value.len()), MAX_NAME)?;
    }
    Ok(hello)
}

impl TryFrom<wire::Hello> for Hello {
    type Error = ConvertError;

    fn try_from(hello: wire::Hello) -> Result<Self> {
        let role = match hello.role() {
            wire::Role::Unspecified => return Err(ConvertError::Missing("role")),
            wire::Role::Node => Role::Node,
            wire::Role::Seed => Role::Seed,
        };
        checked_hello(Self {
            version: hello.version,
            min_version: hello.min_version,
            features: hello.features,
            membership: hello.membership,
            role,
            zone: hello.zone,
            labels: hello.labels,
            data_addresses: addresses(hello.data_addresses)?,
            name: hello.name,
        })
    }
}

impl TryFrom<&Hello> for wire::Hello {
    type Error = ConvertError;

    fn try_from(hello: &Hello) -> Result<Self> {
        let hello = checked_hello(hello.clone())?;
        let role = match hello.role {
            Role::Node => wire::Role::Node,
            Role::Seed => wire::Role::Seed,
        };
        Ok(Self {
            version: hello.version,
            min_version: hello.min_version,
            features: hello.features,
            membership: hello.membership,
            role: role.into(),
            zone: hello.zone,
            labels: hello.labels,
            data_addresses: wire_addresses(&hello.data_addresses)?,
            name: hello.name,
        })
    }
}

fn checked_request(request: Request) -> Result<Request> {
    short("registry", request.image.registry.len(), MAX_SOURCE)?;
    short("repository", request.image.repository.len(), MAX_SOURCE)?;
    if let Asked::Pieces { first, fingerprints, .. } = &request.what {
        if fingerprints.is_empty() {
            return Err(ConvertError::Missing("fingerprints"));
        }
        short("fingerprints", fingerprints.len(), MAX_RUN)?;
        within("last piece", u64::from(*first) + fingerprints.len() as u64, u32::MAX.into())?;
    }
    within("lacks", request.lacks.into(), LACKS_ALL.into())?;
    Ok(request)
}

impl TryFrom<wire::Request> for Request {
    type Error = ConvertError;

    fn try_from(request: wire::Request) -> Result<Self> {
        let priority = match request.priority() {
            wire::Priority::Unspecified => return Err(ConvertError::Missing("priority")),
            wire::Priority::Prefetch => Priority::Prefetch,
            wire::Priority::OnDemand => Priority::OnDemand,
        };
        let image = request.image.ok_or(ConvertError::Missing("image"))?;
        checked_request(Self {
            id: request.id,
            image: ImageSource { registry: image.registry, repository: image.repository },
            what: request.what.ok_or(ConvertError::Missing("what"))?.try_into()?,
            priority,
            source: request.source,
            deadline: duration(request.deadline_ms),
            lacks: request.lacks.try_into().unwrap_or(u16::MAX),
        })
    }
}

impl TryFrom<&Request> for wire::Request {
    type Error = ConvertError;

    fn try_from(request: &Request) -> Result<Self> {
        let request = checked_request(request.clone())?;
        let priority = match request.priority {
            Priority::Prefetch => wire::Priority::Prefetch,
            Priority::OnDemand => wire::Priority::OnDemand,
        };
        Ok(Self {
            id: request.id,
            image: Some(wire::ImageSource { registry: request.image.registry, repository: request.image.repository }),
            what: Some((&request.what).into()),
            priority: priority.into(),
            source: request.source,
            deadline_ms: millis(request.deadline),
            lacks: request.lacks.into(),
        })
    }
}

impl TryFrom<request::What> for Asked {
    type Error = ConvertError;

    fn try_from(what: request::What) -> Result<Self> {
        match what {
            request::What::Pieces(pieces) => {
                short("fingerprints", pieces.fingerprints.len(), MAX_RUN)?;
                Ok(Self::Pieces {
                    bootstrap: pieces.bootstrap[..].try_into()?,
                    blob: pieces.blob[..].try_into()?,
                    first: pieces.first,
                    fingerprints: pieces.fingerprints.iter().map(|f| f[..].try_into()).collect::<Result<_, _>>()?,
                    manifest: match &pieces.manifest[..] {
                        [] => None,
                        manifest => Some(manifest.try_into()?),
                    },
                })
            }
            request::What::Object(object) => {
                let kind = match object.kind() {
                    wire::ObjectKind::Unspecified => return Err(ConvertError::Missing("kind")),
                    wire::ObjectKind::Manifest => ObjectKind::Manifest,
                    wire::ObjectKind::Blob => ObjectKind::Blob,
                    wire::ObjectKind::HashList => ObjectKind::HashList,
                    wire::ObjectKind::StartTrace => ObjectKind::StartTrace,
                };
                Ok(Self::Object { id: object.id[..].try_into()?, kind })
            }
        }
    }
}

impl From<&Asked> for request::What {
    fn from(what: &Asked) -> Self {
        match what {
            Asked::Pieces { bootstrap, blob, first, fingerprints, manifest } => Self::Pieces(wire::Pieces {
                bootstrap: bootstrap.as_bytes().to_vec(),
                blob: blob.as_bytes().to_vec(),
                first: *first,
                fingerprints: fingerprints.iter().map(|f| f.as_bytes().to_vec()).collect(),
                manifest: manifest.map_or_else(Vec::new, |manifest| manifest.as_bytes().to_vec()),
            }),
            Asked::Object { id, kind } => {
                let kind = match kind {
                    ObjectKind::Manifest => wire::ObjectKind::Manifest,
                    ObjectKind::Blob => wire::ObjectKind::Blob,
                    ObjectKind::HashList => wire::ObjectKind::HashList,
                    ObjectKind::StartTrace => wire::ObjectKind::StartTrace,
                };
                Self::Object(wire::Object { id: id.as_bytes().to_vec(), kind: kind.into() })
            }
        }
    }
}

fn checked_window(first: u32, len: u32) -> Result<()> {
    within("last piece", u64::from(first) + u64::from(len), u32::MAX.into())?;
    within("pieces", len.into(), MAX_WIRE_PIECES.into())
}

impl TryFrom<wire::Have> for Have {
    type Error = ConvertError;

    fn try_from(have: wire::Have) -> Result<Self> {
        let pieces = have.pieces.as_ref().ok_or(ConvertError::Missing("pieces"))?;
        checked_window(have.first, pieces.length)?;
        Ok(Self {
            bootstrap: have.bootstrap[..].try_into()?,
            blob: have.blob[..].try_into()?,
            full: have.full,
            first: have.first,
            pieces: Bitfield::from_wire(pieces, MAX_WIRE_PIECES)?,
        })
    }
}

impl TryFrom<&Have> for wire::Have {
    type Error = ConvertError;

    fn try_from(have: &Have) -> Result<Self> {
        checked_window(have.first, have.pieces.len())?;
        Ok(Self {
            bootstrap: have.bootstrap.as_bytes().to_vec(),
            blob: have.blob.as_bytes().to_vec(),
            full: have.full,
            first: have.first,
            pieces: Some(have.pieces.to_wire()),
        })
    }
}

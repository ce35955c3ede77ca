use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::*;

macro_rules! ids {
    ($($name:ident: $type:ident),*) => {
        $(fn $name() -> impl Strategy<Value = $type> {
            any::<[u8; 32]>().prop_map($type::new)
        })*
    };
}
ids!(blob_id: BlobId, object_id: ObjectId, peer_id: PeerId, fingerprint: Fingerprint);

fn wait() -> impl Strategy<Value = Duration> {
    (0..=MAX_WAIT.as_millis() as u64).prop_map(Duration::from_millis)
}

fn address() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        (any::<[u8; 4]>(), 1u16..).prop_map(SocketAddr::from),
        (any::<[u8; 16]>(), 1u16..).prop_map(SocketAddr::from),
    ]
}

fn contacts() -> impl Strategy<Value = Vec<Contact>> {
    let contact =
        (peer_id(), vec(address(), 0..=MAX_ADDRESSES)).prop_map(|(peer, addresses)| Contact { peer, addresses });
    vec(contact, 0..=MAX_CONTACTS)
}

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9.\u{e9}-]{0,64}"
}

fn hello() -> impl Strategy<Value = Message> {
    let who = (vec(any::<u8>(), 0..=MAX_MEMBERSHIP), prop_oneof![Just(Role::Node), Just(Role::Seed)]);
    let labels = proptest::collection::btree_map(name(), name(), 0..=MAX_LABELS);
    (1..9u32, 0..9u32, any::<u64>(), who, name(), labels, vec(address(), 0..=MAX_ADDRESSES), name()).prop_map(
        |(min_version, more, features, (membership, role), zone, labels, data_addresses, name)| {
            Message::Hello(Hello {
                version: min_version + more,
                min_version,
                features,
                membership: membership.into(),
                role,
                zone,
                labels,
                data_addresses,
                name,
            })
        },
    )
}

fn request() -> impl Strategy<Value = Message> {
    let first = 0..u32::MAX - MAX_RUN as u32;
    let pieces = (object_id(), blob_id(), first, vec(fingerprint(), 1..=MAX_RUN), proptest::option::of(object_id()))
        .prop_map(|(bootstrap, blob, first, fingerprints, manifest)| Asked::Pieces {
            bootstrap,
            blob,
            first,
            fingerprints,
            manifest,
        });
    let kind = [ObjectKind::Manifest, ObjectKind::Blob, ObjectKind::HashList, ObjectKind::StartTrace];
    let kind = proptest::sample::select(kind.to_vec());
    let object = (object_id(), kind).prop_map(|(id, kind)| Asked::Object { id, kind });
    let priority = prop_oneof![Just(Priority::Prefetch), Just(Priority::OnDemand)];
    let image = (name(), name()).prop_map(|(registry, repository)| ImageSource { registry, repository });
    (any::<u64>(), image, prop_oneof![pieces, object], priority, any::<bool>(), wait(), 0..=LACKS_ALL).prop_map(
        |(id, image, what, priority, source, deadline, lacks)| {
            Message::Request(Request { id, image, what, priority, source, deadline, lacks })
        },
    )
}

fn data() -> impl Strategy<Value = Message> {
    let part = (1..=MAX_PAYLOAD as u32, 0..1u64 << 20, 0..1u64 << 20);
    (any::<u64>(), any::<u32>(), prop_oneof![part, Just((0, 0, 0))]).prop_map(
        |(request, piece, (length, offset, rest))| {
            Message::Data(Data { request, piece, total: offset + u64::from(length) + rest, offset, length })
        },
    )
}

fn have() -> impl Strategy<Value = Message> {
    let pieces = (0..2000u32, vec(any::<u32>(), 0..300)).prop_map(|(len, set)| {
        let mut field = Bitfield::new(len);
        set.iter().for_each(|piece| _ = field.insert(piece % len.max(1)));
        field
    });
    (object_id(), blob_id(), any::<bool>(), 0..u32::MAX - 2000, pieces).prop_map(
        |(bootstrap, blob, full, first, pieces)| Message::Have(Have { bootstrap, blob, full, first, pieces }),
    )
}

fn message() -> impl Strategy<Value = Message> {
    let status = vec![Status::Complete, Status::Cancelled, Status::Failed, Status::Refused];
    let id = any::<u64>();
    prop_oneof![
        hello(),
        request(),
        data(),
        (id, any::<u32>()).prop_map(|(request, piece)| Message::NotHave { request, piece }),
        (id, wait()).prop_map(|(request, eta)| Message::Pending { request, eta }),
        (id, wait(), contacts()).prop_map(|(request, retry_after, alternates)| Message::Busy {
            request,
            retry_after,
            alternates
        }),
        (id, vec(peer_id(), 0..=MAX_CONTACTS)).prop_map(|(request, members)| Message::NotMyHome { request, members }),
        (id, name()).prop_map(|(request, reason)| Message::CannotSource { request, reason }),
        (id, proptest::sample::select(status)).prop_map(|(request, status)| Message::End { request, status }),
        id.prop_map(|request| Message::Cancel { request }),
        have(),
        (object_id(), blob_id()).prop_map(|(bootstrap, blob)| Message::Interest { bootstrap, blob }),
        (blob_id(), contacts()).prop_map(|(blob, contacts)| Message::Peers { blob, contacts }),
        (object_id(), vec((any::<u32>(), any::<u32>()), 0..80))
            .prop_map(|(bootstrap, pieces)| Message::Trace { bootstrap, trace: StartTrace::of(pieces) }),
        (any::<u32>(), name()).prop_map(|(code, reason)| Message::Close { code, reason }),
    ]
}

proptest! {
    #[test]
    fn every_message_round_trips_and_waits_for_its_last_byte(message in message(), after: [u8; 3]) {
        let mut bytes = Vec::new();
        encode_header(&message, &mut bytes).unwrap();
        let len = bytes.len();
        for part in [0, 3, 4, len - 1] {
            prop_assert_eq!(decode_header(&bytes[..part]), Ok(None));
        }
        bytes.extend(after);
        prop_assert_eq!(decode_header(&bytes), Ok(Some((message, len))));
    }

    #[test]
    fn arbitrary_bytes_are_a_message_or_an_error(body in vec(any::<u8>(), 0..600)) {
        if let Ok(message) = decode_body(&body) {
            let mut bytes = Vec::new();
            encode_header(&message, &mut bytes).unwrap();
            prop_assert_eq!(decode_header(&bytes), Ok(Some((message, bytes.len()))));
        }
    }

    #[test]
    fn a_damaged_message_is_a_message_or_an_error(message in message(), at: prop::sample::Index, flip in 1u8..) {
        let mut bytes = Vec::new();
        encode_header(&message, &mut bytes).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(Some((message, _))) = decode_header(&bytes) {
            prop_assert!(message.payload_len() <= MAX_PAYLOAD);
        }
    }
}

#[test]
fn lengths_out_of_bounds_are_refused_before_the_header_is_there() {
    for found in [0, MAX_HEADER as u32 + 1, u32::MAX] {
        assert_eq!(decode_header(&found.to_le_bytes()), Err(CodecError::HeaderLength { found }));
    }
}

#[test]
fn what_the_other_side_would_refuse_is_not_sent() {
    let image = || ImageSource { registry: "r".repeat(MAX_SOURCE), repository: "x".repeat(MAX_SOURCE) };
    let asks = |first, count, lacks| {
        Message::Request(Request {
            id: 1,
            image: image(),
            what: Asked::Pieces {
                bootstrap: ObjectId::new([1; 32]),
                blob: BlobId::new([2; 32]),
                first,
                fingerprints: vec![Fingerprint::new([3; 32]); count],
                manifest: Some(ObjectId::new([4; 32])),
            },
            priority: Priority::OnDemand,
            source: false,
            deadline: Duration::ZERO,
            lacks,
        })
    };
    let pieces = |first, count| asks(first, count, 0);
    let data = |total, offset, length| Message::Data(Data { request: 1, piece: 0, total, offset, length });
    let hello = |version, min_version, labels| {
        Message::Hello(Hello {
            version,
            min_version,
            features: 0,
            membership: Default::default(),
            role: Role::Node,
            zone: String::new(),
            labels,
            data_addresses: Vec::new(),
            name: String::new(),
        })
    };
    let labels = |count| (0..count).map(|n| (n.to_string(), String::new())).collect::<BTreeMap<_, _>>();
    let sends = |message: &Message| encode_header(message, &mut Vec::new()).is_ok();
    let lacking = |lacks| asks(0, 1, lacks);
    for good in [
        pieces(0, 64),
        pieces(u32::MAX - 1, 1),
        lacking(LACKS_ALL),
        data(9, 4, 5),
        data(0, 0, 0),
        hello(1, 1, labels(16)),
    ] {
        assert!(sends(&good), "{good:?}");
    }
    for bad in [
        pieces(0, 0),
        pieces(0, 65),
        pieces(u32::MAX, 1),
        lacking(LACKS_ALL + 1),
        data(9, 5, 5),
        data(9, 4, 0),
        data(1, u64::MAX, 2),
        data(MAX_ANSWER + 1, 0, 1),
        data(1 << 20, 0, MAX_PAYLOAD as u32 + 1),
        hello(1, 2, labels(0)),
        hello(1, 0, labels(0)),
        hello(1, 1, labels(17)),
        Message::CannotSource { request: 1, reason: "x".repeat(MAX_REASON + 1) },
        Message::Close { code: 1, reason: "x".repeat(MAX_REASON + 1) },
        Message::Peers {
            blob: BlobId::new([0; 32]),
            contacts: vec![Contact { peer: PeerId::new([0; 32]), addresses: vec!["1.2.3.4:0".parse().unwrap()] }],
        },
    ] {
        assert!(!sends(&bad), "{bad:?}");
    }
}

//! Preheats over gossip: a request that nodes fetch an image before it is needed there, and what those that do it say of
//! how far they are.
//!
//! A request names the image with its digest, so that all fetch the same one, and says who is meant: by role, by zone, or
//! one by one. Each node finds out for itself whether it is meant. As with a lease, gossip proves who wrote a message, and
//! the certificate in it that the writer is a member. A request may come again under its id: whoever joined meanwhile
//! hears it then, and the others take no notice, unless they are asked by name: those say again how far they are.

use std::time::Duration;

use bytes::Bytes;
use prost::{Message, Oneof};
use shoal_proto::{PeerId, Role};
use shoal_rafs::oci::Reference;

use crate::{admission::Admission, membership::Refusal};

/// Most nodes that a request can name one by one, so that it fits a message.
pub const MAX_NAMED: usize = 64;
/// Longest name of a zone, as the configuration has it.
const MAX_ZONE: usize = 64;
/// Most bytes that are told of what went wrong.
const MAX_TROUBLE: usize = 256;

/// Names a preheat: random, so that no two are the same.
pub type PreheatId = [u8; 16];

/// Who is to fetch the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    /// Every seed peer.
    Seeds,
    /// Every node.
    All,
    /// Every node of a zone.
    Zone(String),
    /// These, at most [`MAX_NAMED`].
    Nodes(Vec<PeerId>),
}

impl Chosen {
    /// Whether a node is meant.
    pub fn means(&self, peer: &PeerId, role: Role, zone: &str) -> bool {
        match self {
            Self::Seeds => role == Role::Seed,
            Self::All => true,
            Self::Zone(meant) => meant == zone,
            Self::Nodes(peers) => peers.contains(peer),
        }
    }
}

/// That an image is to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preheat {
    /// Its name.
    pub id: PreheatId,
    /// The image, with its digest, in a registry.
    pub reference: Reference,
    /// By whom.
    pub chosen: Chosen,
    /// For how long it is pinned there.
    pub lifetime: Duration,
}

/// How far a node is with a preheat.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Encoded bytes of the image, and how many of them are there; nothing as long as that is unknown.
    pub bytes: u64,
    /// See above.
    pub present_bytes: u64,
    /// Whether there will be no other word from this node.
    pub over: bool,
    /// Why it could not fetch the image; empty if nothing went wrong.
    pub trouble: String,
}

/// A message of this topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// Somebody asks for a preheat.
    Asked(Preheat),
    /// The writer says how far it is.
    Stands(PreheatId, Standing),
}

/// Why a message is no word about a preheat.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordError {
    #[error("the message is malformed")]
    Malformed,
    #[error("its writer is no member")]
    Membership(#[from] Refusal),
}

impl Word {
    /// The message that says so; `shown` is the writer's membership.
    pub(super) fn encode(&self, shown: &Bytes) -> Vec<u8> {
        let (id, what) = match self {
            Self::Asked(preheat) => (preheat.id, What::Asked(asked(preheat))),
            Self::Stands(id, standing) => (*id, What::Stands(stands(standing))),
        };
        WordMessage { membership: shown.clone(), id: id.to_vec(), what: Some(what) }.encode_to_vec()
    }

    /// Reads what `author` wrote, whom gossip has authenticated.
    pub(super) fn decode(
        bytes: &[u8],
        author: &PeerId,
        admission: &Admission,
        now_unix: u64,
    ) -> Result<Self, WordError> {
        let message = WordMessage::decode(bytes).map_err(|_| WordError::Malformed)?;
        admission.admit(&message.membership, author, now_unix)?;
        let id = PreheatId::try_from(&message.id[..]).map_err(|_| WordError::Malformed)?;
        let word = match message.what.ok_or(WordError::Malformed)? {
            What::Asked(asked) => Self::Asked(read_asked(id, asked).ok_or(WordError::Malformed)?),
            What::Stands(stands) => Self::Stands(id, read_stands(stands).ok_or(WordError::Malformed)?),
        };
        Ok(word)
    }
}

fn asked(preheat: &Preheat) -> AskedMessage {
    let (group, zone, peers) = match &preheat.chosen {
        Chosen::Seeds => (Group::Seeds, String::new(), Vec::new()),
        Chosen::All => (Group::All, String::new(), Vec::new()),
        Chosen::Zone(zone) => (Group::Zone, zone.clone(), Vec::new()),
        Chosen::Nodes(peers) => {
            let named = peers.iter().take(MAX_NAMED);
            (Group::Nodes, String::new(), named.map(|peer| peer.as_bytes().to_vec()).collect())
        }
    };
    let lifetime_s = preheat.lifetime.as_secs();
    AskedMessage { reference: preheat.reference.to_string(), group: group.into(), zone, peers, lifetime_s }
}

fn read_asked(id: PreheatId, asked: AskedMessage) -> Option<Preheat> {
    let reference: Reference = asked.reference.parse().ok()?;
    // A folder of whoever reads this would be anybody's choice of what it reads.
    if reference.digest().is_none() || reference.source().is_layout() {
        return None;
    }
    let chosen = match Group::try_from(asked.group).ok()? {
        Group::Seeds => Chosen::Seeds,
        Group::All => Chosen::All,
        Group::Zone => Chosen::Zone(Some(asked.zone).filter(|zone| zone.len() <= MAX_ZONE)?),
        Group::Nodes => {
            let named = Some(asked.peers).filter(|peers| peers.len() <= MAX_NAMED)?;
            let peers = named.iter().map(|bytes| PeerId::try_from(&bytes[..]).ok());
            Chosen::Nodes(peers.collect::<Option<_>>()?)
        }
        Group::Unknown => return None,
    };
    Some(Preheat { id, reference, chosen, lifetime: Duration::from_secs(asked.lifetime_s) })
}

fn stands(standing: &Standing) -> StandsMessage {
    let end = (0..=standing.trouble.len().min(MAX_TROUBLE)).rev().find(|&at| standing.trouble.is_char_boundary(at));
    StandsMessage {
        bytes: standing.bytes,
        present_bytes: standing.present_bytes,
        over: standing.over,
        trouble: standing.trouble[..end.unwrap_or(0)].to_owned(),
    }
}

fn read_stands(stands: StandsMessage) -> Option<Standing> {
    let StandsMessage { bytes, present_bytes, over, trouble } = stands;
    let sensible = present_bytes <= bytes && trouble.len() <= MAX_TROUBLE && !trouble.contains(char::is_control);
    sensible.then_some(Standing { bytes, present_bytes, over, trouble })
}

#[derive(Clone, PartialEq, Message)]
struct WordMessage {
    #[prost(bytes = "bytes", tag = "1")]
    membership: Bytes,
    #[prost(bytes = "vec", tag = "2")]
    id: Vec<u8>,
    #[prost(oneof = "What", tags = "3, 4")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(message, tag = "3")]
    Asked(AskedMessage),
    #[prost(message, tag = "4")]
    Stands(StandsMessage),
}

#[derive(Clone, PartialEq, Message)]
struct AskedMessage {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(enumeration = "Group", tag = "2")]
    group: i32,
    #[prost(string, tag = "3")]
    zone: String,
    #[prost(bytes = "vec", repeated, tag = "4")]
    peers: Vec<Vec<u8>>,
    #[prost(uint64, tag = "5")]
    lifetime_s: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum Group {
    Unknown = 0,
    Seeds = 1,
    All = 2,
    Zone = 3,
    Nodes = 4,
}

#[derive(Clone, PartialEq, Message)]
struct StandsMessage {
    #[prost(uint64, tag = "1")]
    bytes: u64,
    #[prost(uint64, tag = "2")]
    present_bytes: u64,
    #[prost(bool, tag = "3")]
    over: bool,
    #[prost(string, tag = "4")]
    trouble: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shoal_proto::ObjectId;

    use super::*;
    use crate::{
        identity::Identity,
        membership::{Membership, Policy},
    };

    fn peer(n: u8) -> PeerId {
        PeerId::new([n; 32])
    }

    /// An open cluster, and a member of it.
    fn member() -> (Admission, PeerId) {
        let me = Identity::generate().peer();
        (Admission::new(Policy::Open, Membership::open(me, Role::Node, "a").unwrap()), me)
    }

    fn chosen() -> impl Strategy<Value = Chosen> {
        prop_oneof![
            Just(Chosen::Seeds),
            Just(Chosen::All),
            "[a-z]{1,64}".prop_map(Chosen::Zone),
            proptest::collection::vec(any::<u8>().prop_map(peer), 0..=MAX_NAMED).prop_map(Chosen::Nodes),
        ]
    }

    fn word() -> impl Strategy<Value = Word> {
        let asked = (any::<PreheatId>(), chosen(), any::<u64>()).prop_map(|(id, chosen, seconds)| {
            let reference: Reference = "r.example:5000/app:1".parse().unwrap();
            let reference = reference.pinned(ObjectId::new([7; 32]));
            Word::Asked(Preheat { id, reference, chosen, lifetime: Duration::from_secs(seconds) })
        });
        let stands = (any::<PreheatId>(), any::<u64>(), any::<u64>(), any::<bool>(), "[a-z é]{0,100}");
        let stands = stands.prop_map(|(id, a, b, over, trouble)| {
            Word::Stands(id, Standing { bytes: a.max(b), present_bytes: a.min(b), over, trouble })
        });
        prop_oneof![asked, stands]
    }

    proptest! {
        #[test]
        fn words_round_trip(word in word()) {
            let (admission, me) = member();
            let bytes = word.encode(admission.own().shown());
            prop_assert!(bytes.len() < 4096, "{}", bytes.len());
            prop_assert_eq!(Word::decode(&bytes, &me, &admission, 0), Ok(word));
            prop_assert!(Word::decode(&bytes, &peer(1), &admission, 0).is_err(), "by another than its writer");
        }

        #[test]
        fn bytes_of_any_kind_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let (admission, me) = member();
            prop_assert!(Word::decode(&bytes, &me, &admission, 0).is_err());
        }
    }

    #[test]
    fn what_no_node_would_write_is_refused() {
        let (admission, me) = member();
        let decode = |what: What, id: &[u8]| {
            let membership = admission.own().shown().clone();
            let message = WordMessage { membership, id: id.to_vec(), what: Some(what) };
            Word::decode(&message.encode_to_vec(), &me, &admission, 0)
        };
        let digest = "ab".repeat(32);
        let asked = |reference: &str, group: Group| AskedMessage {
            reference: reference.into(),
            group: group.into(),
            ..AskedMessage::default()
        };
        let good = format!("r.example/app@sha256:{digest}");
        assert!(decode(What::Asked(asked(&good, Group::All)), &[1; 16]).is_ok());
        let folder = format!("oci:/etc@sha256:{digest}");
        for (reference, group) in [
            ("r.example/app:1", Group::All),
            (folder.as_str(), Group::All),
            ("", Group::All),
            (&good, Group::Unknown),
        ] {
            assert_eq!(
                decode(What::Asked(asked(reference, group)), &[1; 16]),
                Err(WordError::Malformed),
                "{reference}"
            );
        }
        assert!(decode(What::Asked(asked(&good, Group::All)), &[1; 15]).is_err());
        let crowd = AskedMessage { peers: vec![vec![1; 32]; MAX_NAMED + 1], ..asked(&good, Group::Nodes) };
        assert!(decode(What::Asked(crowd), &[1; 16]).is_err());
        for stands in [
            StandsMessage { bytes: 1, present_bytes: 2, ..StandsMessage::default() },
            StandsMessage { trouble: "x".repeat(MAX_TROUBLE + 1), ..StandsMessage::default() },
            StandsMessage { trouble: "\u{1b}[2J".into(), ..StandsMessage::default() },
        ] {
            assert!(decode(What::Stands(stands), &[1; 16]).is_err());
        }
    }

    #[test]
    fn everybody_finds_out_who_is_meant() {
        let means = |chosen: Chosen| chosen.means(&peer(1), Role::Node, "a");
        assert!(
            means(Chosen::All) && means(Chosen::Zone("a".into())) && means(Chosen::Nodes(vec![peer(2), peer(1)]))
        );
        assert!(!means(Chosen::Seeds) && !means(Chosen::Zone("b".into())) && !means(Chosen::Nodes(vec![peer(2)])));
        assert!(Chosen::Seeds.means(&peer(1), Role::Seed, "a"));
    }
}

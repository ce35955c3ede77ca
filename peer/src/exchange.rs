//! Who has what: interest, bitfields and peer exchange between neighbours, and what the control plane says of nodes.
//!
//! Whoever reads an image tells every neighbour that it is interested in its blobs, and hears from then on what they can
//! serve: at once all of it, later what is new, as often as [`announce_interval`](shoal_scheduler::announce_interval) says. With
//! the first answer come contacts of others that are interested, so that neighbours are found without asking the DHT. No decision
//! about pieces is made here; the scheduler hears everything.
//!
//! What is said of a blob holds for as long as somebody here needs its image: whoever loads it again later asks again, since the
//! scheduler has forgotten who has what. A neighbour whose queue is full is told later, and then all of it.

mod interest;
mod news;
mod records;
mod starts;
mod zones;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use libp2p::Multiaddr;
use shoal_proto::{BlobId, Contact, FEATURE_HASH_LISTS, Have, MAX_CONTACTS, Message, ObjectId, PeerId, Role};
use shoal_scheduler::{Event, PROMPT};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use self::{interest::Interests, news::News, records::Records, zones::Zones};
use crate::{
    contacts::{Contacts, Fault},
    control::{Control, ControlEvent, Word},
    data::{Closing, DataPlane, Gone, NotifyError, PeerEvent},
    driver::{Clock, DriverHandle, StakeWatch},
    images::{Image, ImageBlob, Images},
    plain::{self, PlainBlob},
    starts::CollectedStarts,
};

/// How often it is looked for news, unless no neighbour had some of it.
const TICK: Duration = Duration::from_millis(100);
/// Neighbours that a node looks for by itself, without a reason such as a home or a shared image.
const FEW_NEIGHBOURS: usize = 8;
/// Most neighbours that peer exchange leads to for a blob.
const MANY_NEIGHBOURS: usize = 32;
/// Most neighbours with which no more are looked for, whatever the number of blobs: each is told of whatever it shares with this node.
const MOST_NEIGHBOURS: usize = 512;

/// A blob as one image names its pieces: what interest and bitfields are about.
type Topic = (ObjectId, BlobId);
/// No topic comes before this one.
const FIRST_TOPIC: Topic = (ObjectId::new([0; 32]), BlobId::new([0; 32]));

/// The exchange with the neighbours. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Exchange {
    parts: Arc<ExchangeParts>,
    /// Locked for a look-up or a note.
    state: Arc<Mutex<State>>,
    /// Locked for a look-up or a note, also while the state is.
    zones: Arc<Mutex<Zones>>,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("me", &self.parts.me).finish_non_exhaustive()
    }
}

/// What the exchange works with.
pub(crate) struct ExchangeParts {
    pub me: PeerId,
    pub role: Role,
    pub zone: String,
    pub clock: Clock,
    pub data: DataPlane,
    pub control: Control,
    /// Where the control plane listens, for people.
    pub listening: watch::Sender<Vec<Multiaddr>>,
    /// What others say about preheats; what there is no room for will be said again.
    pub words: mpsc::Sender<(PeerId, Word)>,
    pub driver: DriverHandle,
    pub images: Images,
    pub contacts: Contacts,
    /// What is told of starts, where this node is a seed peer.
    pub starts: CollectedStarts,
}

#[derive(Default)]
struct State {
    /// Blobs that this node reads, as long as they are known to the scheduler.
    mine: BTreeMap<Topic, StakeWatch>,
    /// Who wants to hear about which blob.
    interests: Interests,
    news: News,
    records: Records,
}

/// Why a peer may be worth a connection.
#[derive(Debug, Clone, Copy)]
enum Reason {
    /// It is there.
    Seen,
    /// It shares this blob.
    Shares(BlobId),
    /// It is a home in this zone.
    Home,
    /// There was one.
    Back,
}

impl Exchange {
    pub(crate) fn new(parts: ExchangeParts) -> Self {
        let zones = Arc::new(Mutex::new(Zones::new(parts.zone.clone())));
        Self { parts: Arc::new(parts), state: Arc::default(), zones }
    }

    /// Runs until both planes have ended.
    pub(crate) async fn run(self, mut peers: mpsc::Receiver<PeerEvent>, mut control: mpsc::Receiver<ControlEvent>) {
        let mut next = Instant::now();
        loop {
            tokio::select! {
                Some(event) = peers.recv() => self.peer(event).await,
                Some(event) = control.recv() => self.control(event).await,
                () = sleep_until(next) => {
                    let wait = self.tell_news().await.map_or(TICK, |wait| wait.min(TICK));
                    next = Instant::now() + wait;
                }
                () = self.parts.driver.pressing_news().come() => next = next.min(Instant::now() + PROMPT),
                else => return,
            }
        }
    }

    /// From now on this node reads `image`: its neighbours are told, and more are looked for.
    pub(crate) fn interested_in(&self, image: &Image) {
        self.interested_in_blobs(image.layer, &image.blobs);
    }

    /// The same for a blob that no image describes.
    pub(crate) fn interested_in_plain(&self, plain: &PlainBlob) {
        self.interested_in_blobs(plain::as_bootstrap(plain.id()), std::slice::from_ref(&plain.blob));
    }

    fn interested_in_blobs(&self, bootstrap: ObjectId, blobs: &[ImageBlob]) {
        let new: Vec<Topic> = {
            let mut state = self.lock();
            let topics = blobs.iter().map(|blob| ((bootstrap, blob.table.blob()), blob.stake.watch()));
            // What was heard for another stake is forgotten, or about to be.
            let new = |(topic, stake): (Topic, StakeWatch)| {
                let known = state.mine.get(&topic).is_some_and(|known| known.is(&stake));
                (!known).then(|| state.mine.insert(topic, stake)).map(|_| topic)
            };
            topics.filter_map(new).collect()
        };
        if new.is_empty() {
            return;
        }
        let exchange = self.clone();
        tokio::spawn(async move {
            for connection in exchange.parts.data.connections() {
                new.iter().for_each(|&topic| _ = exchange.show_interest(connection.peer, topic));
            }
            for (_, blob) in new {
                if let Err(error) = exchange.parts.control.find_providers(blob).await {
                    tracing::debug!("no look-up: {error}");
                }
            }
        });
    }

    async fn peer(&self, event: PeerEvent) {
        match event {
            PeerEvent::Up { peer, hello } => {
                self.parts.contacts.seen(peer, hello.role, &hello.zone, &hello.data_addresses);
                self.zones().connected(peer, &hello.zone);
                let up = Event::PeerUp { peer, role: hello.role, zone: hello.zone, labels: hello.labels };
                self.parts.driver.event(up).await;
                self.show_all_interest(peer, FIRST_TOPIC);
            }
            PeerEvent::Down { peer, why } => {
                tracing::debug!(%peer, "disconnected: {why}");
                if let Gone::Ours { why: Closing::Violation, detail } = &why {
                    self.parts.contacts.fault(peer, Fault::Violation, detail);
                }
                {
                    let mut state = self.lock();
                    state.interests.forget(peer);
                    state.news.forget(peer);
                }
                self.zones().gone(peer);
                self.parts.driver.event(Event::PeerDown { peer }).await;
                if matches!(why, Gone::Ours { why: Closing::Expired, .. }) {
                    // It may have a new certificate to show.
                    self.approach(peer, Reason::Back);
                }
            }
            PeerEvent::Have { peer, have } => {
                if let Some(blob) = self.blob((have.bootstrap, have.blob)) {
                    let Have { first, pieces, full, .. } = have;
                    self.parts
                        .driver
                        .event(Event::PeerHave { peer, blob: blob.key, first, have: pieces, full })
                        .await;
                }
            }
            PeerEvent::Interest { peer, bootstrap, blob } => self.heard_interest(peer, (bootstrap, blob)),
            PeerEvent::Flood { peer } => {
                self.parts.contacts.fault(peer, Fault::Flood, "says more than anybody needs to");
            }
            PeerEvent::Trace { peer, bootstrap, trace } => self.heard_start(peer, bootstrap, trace),
            // Only what was asked for by interest: whoever else is named need not be looked for.
            PeerEvent::Peers { blob, contacts, .. } if self.reads(blob) => {
                for contact in contacts {
                    let peer = contact.peer;
                    self.parts.contacts.heard_of(contact);
                    self.approach(peer, Reason::Shares(blob));
                }
            }
            PeerEvent::Peers { peer, blob, .. } => {
                tracing::trace!(%peer, %blob, "names others that nobody asked for")
            }
        }
    }

    async fn control(&self, event: ControlEvent) {
        match event {
            ControlEvent::PeerSeen { peer, role, zone, data_addresses } => {
                self.parts.contacts.seen(peer, role, &zone, &data_addresses);
                self.approach(peer, Reason::Seen);
            }
            ControlEvent::Lease { peer, zone, capacity, data_addresses, until } => {
                self.parts.contacts.seen(peer, Role::Seed, &zone, &data_addresses);
                self.parts.contacts.lease(peer, true);
                self.zones().lease(peer, &zone);
                if zone == self.parts.zone {
                    self.approach(peer, Reason::Home);
                }
                let until = self.parts.clock.at(until);
                self.parts.driver.event(Event::Lease { peer, zone, capacity: capacity.into(), until }).await;
            }
            ControlEvent::LeaseEnded { peer } => {
                self.parts.contacts.lease(peer, false);
                self.zones().lease_ended(peer);
                self.parts.driver.event(Event::LeaseEnded { peer }).await;
            }
            ControlEvent::Providers { blob, peers } => {
                peers.into_iter().for_each(|peer| self.approach(peer, Reason::Shares(blob)));
            }
            ControlEvent::Listening(addresses) => {
                addresses.iter().for_each(|address| tracing::info!("control plane listens on {address}"));
                self.parts.listening.send_replace(addresses);
            }
            ControlEvent::Preheat { peer, word } => {
                if self.parts.words.try_send((peer, word)).is_err() {
                    tracing::debug!(%peer, "a word about a preheat is not heard");
                }
            }
            ControlEvent::PeerLost { peer } => tracing::debug!(%peer, "gone from the control plane"),
        }
    }

    /// Connects to `peer` unless there are enough neighbours.
    fn approach(&self, peer: PeerId, why: Reason) {
        let parts = &self.parts;
        if peer == parts.me || parts.contacts.is_banned(peer) || self.has_enough(why) {
            return;
        }
        if self.zones().has_enough_of(&parts.contacts.zone(peer)) {
            return;
        }
        parts.data.connect(peer, &parts.contacts.addresses(peer));
    }

    fn has_enough(&self, why: Reason) -> bool {
        let connected = self.parts.data.connected();
        match why {
            Reason::Seen => connected >= FEW_NEIGHBOURS,
            // Those that are being dialled may be for it.
            Reason::Shares(blob) => {
                connected >= MOST_NEIGHBOURS || self.sharers(blob) + self.parts.data.dials() >= MANY_NEIGHBOURS
            }
            Reason::Back => connected >= MOST_NEIGHBOURS,
            Reason::Home => false,
        }
    }

    /// How many neighbours read a blob that this node reads.
    fn sharers(&self, blob: BlobId) -> usize {
        let state = self.lock();
        let topics = state.mine.keys().filter(|(_, mine)| *mine == blob);
        topics.map(|topic| state.interests.of(topic).map_or(0, |peers| peers.len())).max().unwrap_or(0)
    }

    /// Whether this node is interested in a blob.
    fn reads(&self, blob: BlobId) -> bool {
        self.lock().mine.keys().any(|(_, mine)| *mine == blob)
    }

    fn heard_interest(&self, peer: PeerId, topic: Topic) {
        let others = {
            let mut state = self.lock();
            state.interests.insert(peer, topic);
            let zones = self.zones();
            state.interests.others(peer, &topic, MAX_CONTACTS, |other| zones.are_together(peer, other))
        };
        if let Some(blob) = self.blob(topic) {
            self.tell_first(peer, topic, &blob.handle.present());
        }
        let contacts =
            others.into_iter().map(|peer| Contact { peer, addresses: self.parts.contacts.addresses(peer) });
        let contacts: Vec<_> = contacts.filter(|contact| !contact.addresses.is_empty()).collect();
        if !contacts.is_empty() {
            // Who has no room for it hears of others from others.
            let _ = self.notify(peer, Message::Peers { blob: topic.1, contacts });
        }
    }

    /// Says to `peer` that this node reads a blob; false if that has to wait.
    fn show_interest(&self, peer: PeerId, topic: Topic) -> bool {
        let (bootstrap, blob) = topic;
        if plain::is_plain(bootstrap, blob) && !self.parts.data.has_feature(peer, FEATURE_HASH_LISTS) {
            // It would look for such an image in vain whenever it is asked.
            return true;
        }
        let full = self.notify(peer, Message::Interest { bootstrap, blob }) == Err(NotifyError::Full);
        if full {
            self.lock().news.owes_interest(peer, topic);
        }
        !full
    }

    /// Says to `peer` all that this node reads, from a topic on.
    fn show_all_interest(&self, peer: PeerId, from: Topic) {
        let mine: Vec<_> = {
            let state = self.lock();
            let held = state.mine.range(from..).filter(|(_, stake)| stake.is_held());
            held.map(|(topic, _)| *topic).collect()
        };
        // What is behind the first for which there is no room comes after it.
        let _ = mine.into_iter().all(|topic| self.show_interest(peer, topic));
    }

    fn blob(&self, (layer, id): Topic) -> Option<ImageBlob> {
        self.parts.images.described(layer, id)
    }

    fn notify(&self, peer: PeerId, message: Message) -> Result<(), NotifyError> {
        let said = self.parts.data.notify(peer, message);
        if let Err(error) = &said {
            tracing::trace!(%peer, "not told: {error}");
        }
        said
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn zones(&self) -> MutexGuard<'_, Zones> {
        self.zones.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

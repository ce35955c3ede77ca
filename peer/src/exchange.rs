//! Who has what: interest, bitfields and peer exchange between neighbours, and what the control plane says of nodes.
//!
//! Whoever reads an image tells every neighbour that it is interested in its blobs, and hears from then on what they can
//! serve: at once all of it, later what is new, as often as [`announce_interval`] says. With the first answer come contacts of
//! others that are interested, so that neighbours are found without asking the DHT. No decision about pieces is made
//! here; the scheduler hears everything.

mod starts;
mod zones;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use libp2p::Multiaddr;
use shoal_proto::{
    Bitfield, BlobId, Contact, FEATURE_HASH_LISTS, Have, MAX_CONTACTS, MAX_WIRE_PIECES, Message, ObjectId, PeerId,
    Role,
};
use shoal_scheduler::{Event, PROMPT, Time, announce_interval};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use self::zones::Zones;
use crate::{
    contacts::{Contacts, Fault},
    control::{Control, ControlEvent, Word},
    data::{Closing, DataPlane, Gone, PeerEvent},
    driver::{Clock, DriverHandle},
    images::{Image, ImageBlob, Images},
    plain,
    starts::CollectedStarts,
};

/// How often it is looked for news, unless no neighbour had some of it.
const TICK: Duration = Duration::from_millis(100);
/// How often zones hear of each other's news that have seed peers of their own.
const ELSEWHERE: Duration = Duration::from_secs(2);
/// Neighbours that a node looks for by itself, without a reason such as a home or a shared image.
const FEW_NEIGHBOURS: usize = 8;
/// Most neighbours that peer exchange leads to.
const MANY_NEIGHBOURS: usize = 32;
/// Most blobs whose interested peers are remembered, and most peers of one.
const MAX_TOPICS: usize = 4096;
const MAX_INTERESTED: usize = 256;

/// A blob as one image names its pieces: what interest and bitfields are about.
type Topic = (ObjectId, BlobId);

/// The exchange with the neighbours. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Exchange {
    parts: Arc<ExchangeParts>,
    state: Arc<Mutex<State>>,
    /// Locked for a look-up or a note.
    zones: Arc<Mutex<Zones>>,
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
    /// Blobs that this node reads.
    mine: BTreeSet<Topic>,
    /// Who wants to hear about which blob.
    interested: BTreeMap<Topic, BTreeSet<PeerId>>,
    /// What they were told.
    told: BTreeMap<(Topic, Audience), Told>,
    /// Blobs with a provider record of ours.
    announced: BTreeSet<BlobId>,
}

/// Neighbours that hear the same at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Audience {
    OwnZone,
    OtherZones,
}

/// What became of the news for an audience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Telling {
    /// There is none.
    Nothing,
    /// It is too early by so much.
    Waits(Duration),
    Told,
}

/// What an audience knows of a blob here, and since when.
struct Told {
    pieces: Bitfield,
    at: Time,
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
                () = self.parts.driver.rare_news().come() => next = next.min(Instant::now() + PROMPT),
                else => return,
            }
        }
    }

    /// From now on this node reads `image`: its neighbours are told, and more are looked for.
    pub(crate) fn interested_in(&self, image: &Arc<Image>) {
        self.interested_in_topics(image.blobs.iter().map(|blob| (image.layer, blob.table.blob())));
    }

    /// The same for a blob that no image describes.
    pub(crate) fn interested_in_plain(&self, bootstrap: ObjectId, blob: BlobId) {
        // It may be cut by another list than the last time; what was heard then was about that one.
        self.lock().mine.remove(&(bootstrap, blob));
        self.interested_in_topics([(bootstrap, blob)]);
    }

    fn interested_in_topics(&self, topics: impl IntoIterator<Item = Topic>) {
        let mut state = self.lock();
        if state.mine.len() >= MAX_TOPICS {
            state.mine.retain(|&topic| self.blob(topic).is_some());
        }
        let new: Vec<Topic> = topics.into_iter().filter(|&topic| state.mine.insert(topic)).collect();
        drop(state);
        if new.is_empty() {
            return;
        }
        let exchange = self.clone();
        tokio::spawn(async move {
            for connection in exchange.parts.data.connections() {
                new.iter().for_each(|&topic| exchange.show_interest(connection.peer, topic));
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
                let mine = self.lock().mine.clone();
                for topic in mine.into_iter().filter(|&topic| self.blob(topic).is_some()) {
                    self.show_interest(peer, topic);
                }
            }
            PeerEvent::Down { peer, why } => {
                tracing::debug!(%peer, "disconnected: {why}");
                if let Gone::Ours { why: Closing::Violation, detail } = &why {
                    self.parts.contacts.fault(peer, Fault::Violation, detail);
                }
                for peers in self.lock().interested.values_mut() {
                    peers.remove(&peer);
                }
                self.zones().gone(peer);
                self.parts.driver.event(Event::PeerDown { peer }).await;
                if matches!(why, Gone::Ours { why: Closing::Expired, .. }) {
                    // It may have a new certificate to show.
                    self.approach(peer, MANY_NEIGHBOURS);
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
            PeerEvent::Trace { peer, bootstrap, trace } => self.heard_start(peer, bootstrap, trace),
            // Only what was asked for by interest: whoever else is named need not be looked for.
            PeerEvent::Peers { blob, contacts, .. } if self.reads(blob) => {
                for contact in contacts {
                    let peer = contact.peer;
                    self.parts.contacts.heard_of(contact);
                    self.approach(peer, MANY_NEIGHBOURS);
                }
            }
            PeerEvent::Peers { peer, blob, .. } => {
                tracing::trace!(%peer, %blob, "names others that nobody asked for")
            }
        }
    }

    /// Whether this node is interested in a blob.
    fn reads(&self, blob: BlobId) -> bool {
        self.lock().mine.iter().any(|(_, mine)| *mine == blob)
    }

    async fn control(&self, event: ControlEvent) {
        match event {
            ControlEvent::PeerSeen { peer, role, zone, data_addresses } => {
                self.parts.contacts.seen(peer, role, &zone, &data_addresses);
                self.approach(peer, FEW_NEIGHBOURS);
            }
            ControlEvent::Lease { peer, zone, capacity, data_addresses, until } => {
                self.parts.contacts.seen(peer, Role::Seed, &zone, &data_addresses);
                self.parts.contacts.lease(peer, true);
                self.zones().lease(peer, &zone);
                if zone == self.parts.zone {
                    self.approach(peer, usize::MAX);
                }
                let until = self.parts.clock.at(until);
                self.parts.driver.event(Event::Lease { peer, zone, capacity: capacity.into(), until }).await;
            }
            ControlEvent::LeaseEnded { peer } => {
                self.parts.contacts.lease(peer, false);
                self.zones().lease_ended(peer);
                self.parts.driver.event(Event::LeaseEnded { peer }).await;
            }
            ControlEvent::Providers { peers, .. } => {
                peers.into_iter().for_each(|peer| self.approach(peer, MANY_NEIGHBOURS));
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

    /// Connects to `peer` unless there are `enough` neighbours.
    fn approach(&self, peer: PeerId, enough: usize) {
        let parts = &self.parts;
        if peer == parts.me || parts.contacts.is_banned(peer) || parts.data.connected() >= enough {
            return;
        }
        if self.zones().has_enough_of(&parts.contacts.zone(peer)) {
            return;
        }
        parts.data.connect(peer, &parts.contacts.addresses(peer));
    }

    fn show_interest(&self, peer: PeerId, (bootstrap, blob): Topic) {
        if plain::is_plain(bootstrap, blob) && !self.parts.data.has_feature(peer, FEATURE_HASH_LISTS) {
            // It would look for such an image in vain whenever it is asked.
            return;
        }
        self.notify(peer, Message::Interest { bootstrap, blob });
    }

    fn heard_interest(&self, peer: PeerId, topic: Topic) {
        let others = {
            let mut state = self.lock();
            if state.interested.len() >= MAX_TOPICS && !state.interested.contains_key(&topic) {
                state.interested.retain(|_, peers| !peers.is_empty());
            }
            if state.interested.len() >= MAX_TOPICS && !state.interested.contains_key(&topic) {
                return;
            }
            let peers = state.interested.entry(topic).or_default();
            if peers.len() < MAX_INTERESTED {
                peers.insert(peer);
            }
            // Any of its own zone will do, or else of others; the ids are random, so their order is as good as a draw.
            let others = peers.range((std::ops::Bound::Excluded(peer), std::ops::Bound::Unbounded));
            let mut others: Vec<_> = others.chain(peers.range(..peer)).copied().collect();
            drop(state);
            let zones = self.zones();
            others.sort_by_key(|&other| !zones.are_together(peer, other));
            others.truncate(MAX_CONTACTS);
            others
        };
        if let Some(blob) = self.blob(topic) {
            let present = blob.handle.present();
            for have in windows(topic, &present, true) {
                self.notify(peer, Message::Have(have));
            }
            let (at, audience) = (self.parts.clock.now(), self.audience(peer));
            self.lock().told.entry((topic, audience)).or_insert(Told { pieces: present, at });
        }
        let contacts =
            others.into_iter().map(|peer| Contact { peer, addresses: self.parts.contacts.addresses(peer) });
        let contacts: Vec<_> = contacts.filter(|contact| !contact.addresses.is_empty()).collect();
        if !contacts.is_empty() {
            self.notify(peer, Message::Peers { blob: topic.1, contacts });
        }
    }

    fn audience(&self, peer: PeerId) -> Audience {
        if self.zones().is_other(peer) { Audience::OtherZones } else { Audience::OwnZone }
    }

    /// Tells who is interested what is new since the last time, or gone. Returns when it is time for what no neighbour had and
    /// comes too early.
    async fn tell_news(&self) -> Option<Duration> {
        let mut next: Option<Duration> = None;
        let topics: Vec<_> = {
            let state = self.lock();
            let listened = state.interested.iter().filter(|(_, peers)| !peers.is_empty());
            listened.map(|(topic, peers)| (*topic, peers.clone())).collect()
        };
        for (topic, peers) in topics {
            let Some(blob) = self.blob(topic) else { continue };
            let listeners = peers.len();
            let (others, own): (Vec<_>, Vec<_>) = {
                let zones = self.zones();
                peers.into_iter().partition(|&peer| zones.is_other(peer))
            };
            let told = self.tell(topic, &blob, Audience::OwnZone, &own, listeners);
            let told_others = self.tell(topic, &blob, Audience::OtherZones, &others, listeners);
            // What was rare waits for its own zone to hear of it, if somebody listens there.
            match if own.is_empty() { told_others } else { told } {
                Telling::Waits(wait) if self.parts.driver.rare_news().contains(blob.key) => {
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                }
                Telling::Waits(_) => {}
                Telling::Nothing | Telling::Told => self.parts.driver.rare_news().remove(blob.key),
            }
            if [told, told_others].contains(&Telling::Told) {
                self.announce(&blob).await;
            }
        }
        next
    }

    /// Tells an audience its news, if there is any and it is time; of all `listeners` it may be a part.
    fn tell(&self, topic: Topic, blob: &ImageBlob, to: Audience, peers: &[PeerId], listeners: usize) -> Telling {
        if peers.is_empty() {
            return Telling::Nothing;
        }
        let helps_itself = {
            let zones = self.zones();
            to == Audience::OtherZones && peers.iter().all(|&peer| zones.is_provided_for(peer))
        };
        let pause = |changed, pieces, rare| {
            if helps_itself { ELSEWHERE } else { announce_interval(changed, pieces, rare, listeners) }
        };
        let (news, full) = match self.news(topic, blob, to, pause) {
            Ok(said) => said,
            Err(telling) => return telling,
        };
        for have in windows(topic, &news, full) {
            for &peer in peers {
                self.notify(peer, Message::Have(have.clone()));
            }
        }
        Telling::Told
    }

    /// What an audience has yet to hear, once it is time to tell it, and whether that is all that there is: what has
    /// gone can be said in no other way. It then counts as told.
    ///
    /// # Errors
    /// Why nothing is to be told.
    fn news(
        &self,
        topic: Topic,
        blob: &ImageBlob,
        to: Audience,
        pause: impl FnOnce(u32, u32, bool) -> Duration,
    ) -> Result<(Bitfield, bool), Telling> {
        let (now, rare) = (self.parts.clock.now(), self.parts.driver.rare_news().contains(blob.key));
        let present = blob.handle.present();
        let mut state = self.lock();
        let told = state.told.get(&(topic, to));
        let (mut news, mut gone) = (present.clone(), Bitfield::new(present.len()));
        if let Some(told) = told {
            news.subtract(&told.pieces);
            gone = told.pieces.clone();
            gone.subtract(&present);
        }
        let changed = news.count() + gone.count();
        if changed == 0 {
            return Err(Telling::Nothing);
        }
        let pause = pause(changed, news.len(), rare);
        if let Some(due) = told.map(|told| told.at + pause).filter(|&due| now < due) {
            return Err(Telling::Waits(due.since(now)));
        }
        let full = !gone.is_empty();
        let said = if full { present.clone() } else { news };
        state.told.insert((topic, to), Told { pieces: present, at: now });
        Ok((said, full))
    }

    /// Seed peers, and nodes that hold half of a blob, are worth a provider record.
    async fn announce(&self, blob: &ImageBlob) {
        let id = blob.table.blob();
        let present = blob.handle.present().count();
        let half = present * 2 >= blob.table.len();
        if present > 0
            && (self.parts.role == Role::Seed || half)
            && self.lock().announced.insert(id)
            && let Err(error) = self.parts.control.announce(id).await
        {
            tracing::debug!("not announced: {error}");
        }
    }

    /// The store has let go of a blob. Neighbours are told with the next news.
    pub(crate) async fn evicted(&self, blob: BlobId) {
        let announced = self.lock().announced.remove(&blob);
        if announced && let Err(error) = self.parts.control.withdraw(blob).await {
            tracing::debug!("not withdrawn: {error}");
        }
    }

    fn blob(&self, (layer, id): Topic) -> Option<ImageBlob> {
        self.parts.images.described(layer, id)
    }

    fn notify(&self, peer: PeerId, message: Message) {
        if let Err(error) = self.parts.data.notify(peer, message) {
            tracing::trace!(%peer, "not told: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn zones(&self) -> MutexGuard<'_, Zones> {
        self.zones.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `pieces` cut to what fits a message; of a full set every window, of news only those with something in it.
fn windows((bootstrap, blob): Topic, pieces: &Bitfield, full: bool) -> Vec<Have> {
    let starts = (0..pieces.len()).step_by(MAX_WIRE_PIECES as usize);
    let windows = starts.map(|first| {
        let end = pieces.len().min(first.saturating_add(MAX_WIRE_PIECES));
        Have { bootstrap, blob, full, first, pieces: pieces.window(first, end - first) }
    });
    windows.filter(|have| full || !have.pieces.is_empty()).collect()
}

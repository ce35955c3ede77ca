//! Preheats: images that nodes fetch before they are needed there, because somebody asked one of them for it.
//!
//! ```text
//!   shoal preheat --> asked node --Asked--> gossip --> every node: is it meant? then it fetches, pins for a time,
//!                         ^                                         |
//!                         '--------------- gossip <---- Stands -----'   at most every second, and at the end
//! ```
//!
//! Words are lost: where many speak at once, and where a writer speaks too often. So while somebody waits for the end, those that are
//! not known to be done are asked once more, by their names, and say again how far they are.
//!
//! Only the node that was asked keeps books of who has come how far. All that the nodes of a cluster say of their progress
//! together is bounded, whatever their number: the more there are, the less often each speaks. A node takes part only with
//! images of registries that it reads for others, a few at a time, and for a bounded time.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rand::seq::IteratorRandom;
use sha2::{Digest as _, Sha256};
use shoal_proto::{
    ObjectId, PeerId, Role,
    control::{PrefetchProgress, PreheatNode, PreheatProgress},
};
use shoal_rafs::oci::Reference;
use tokio::sync::{Semaphore, mpsc};

use crate::{
    contacts::Contacts,
    control::{Chosen, Control, ControlError, MAX_NAMED, Preheat, PreheatId, Standing, Word},
    identity,
    images::ImageError,
    node::Node,
    pins::Pins,
    prefetch,
    serve::may_read,
};

/// Words of others that may wait.
pub(crate) const WORDS: usize = 1024;
/// Preheats that are remembered, so that one that is heard again is not begun again.
const MAX_HEARD: usize = 1024;
/// Preheats that this node keeps books of, the latest.
const MAX_ASKED: usize = 16;
/// Most nodes in the books of one preheat.
const MAX_NODES: usize = 16 * 1024;
/// Images that are fetched at a time for preheats; others wait.
const AT_A_TIME: usize = 2;
/// Longest that an image is pinned for a preheat.
pub(crate) const MAX_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Shortest time between two words of progress of one node.
const STEP: Duration = Duration::from_secs(1);
/// The same for each node that is known: fifty words a second in all.
const STEP_PER_NODE: Duration = Duration::from_millis(20);
/// Time between two times that a preheat is said while somebody waits for its end: for who joined meanwhile.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// Who waits is told this often.
const TELL: Duration = Duration::from_millis(500);
/// When all are done that are known of, those that are not known yet have so long to turn up.
const QUIET: Duration = Duration::from_secs(2);
/// After so long without any news, what is missing will not come.
const SILENCE: Duration = Duration::from_secs(60);

/// Why a preheat was not begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PreheatError {
    /// The reference could not be resolved.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Other nodes have other folders.
    #[error("a folder cannot be preheated: other nodes do not have it")]
    Folder,
    /// More than a message can name.
    #[error("at most {MAX_NAMED} nodes can be chosen by number")]
    TooMany,
    /// The node is stopping.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Who is to fetch an image, as a person says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice {
    Seeds,
    All,
    Zone(String),
    Count(usize),
}

/// What preheats work with.
pub(crate) struct PreheatParts {
    pub(crate) me: PeerId,
    pub(crate) role: Role,
    pub(crate) zone: String,
    pub(crate) node: Arc<Node>,
    pub(crate) pins: Pins,
    pub(crate) control: Control,
    pub(crate) contacts: Contacts,
    /// Registries that this node reads for others.
    pub(crate) registries: Vec<String>,
}

/// The preheats that this node takes part in or asked for. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Preheats {
    parts: Arc<PreheatParts>,
    turns: Arc<Semaphore>,
    /// Locked for a look or a note.
    books: Arc<Mutex<Books>>,
}

#[derive(Default)]
struct Books {
    /// Those that this node takes part in, the oldest first.
    heard: VecDeque<(PreheatId, Part)>,
    asked: VecDeque<(PreheatId, Asked)>,
}

/// What this node does for a preheat.
#[derive(Default)]
struct Part {
    /// What it said last.
    said: Standing,
    /// It is about to say it again.
    repeats: bool,
}

/// A preheat that this node was asked for.
struct Asked {
    preheat: Preheat,
    nodes: BTreeMap<PeerId, Standing>,
    news: Instant,
}

impl Preheats {
    pub(crate) fn new(parts: PreheatParts) -> Self {
        Self { parts: Arc::new(parts), turns: Arc::new(Semaphore::new(AT_A_TIME)), books: Arc::default() }
    }

    /// Hears what others say, until they are gone.
    pub(crate) async fn run(self, mut words: mpsc::Receiver<(PeerId, Word)>) {
        while let Some((peer, word)) = words.recv().await {
            match word {
                Word::Asked(preheat) => self.hear(preheat),
                Word::Stands(id, standing) => self.note(peer, id, standing),
            }
        }
    }

    /// Begins a preheat of what `reference` names at present.
    ///
    /// # Errors
    /// See [`PreheatError`].
    pub(crate) async fn ask(
        &self,
        reference: &Reference,
        choice: Choice,
        lifetime: Duration,
    ) -> Result<PreheatId, PreheatError> {
        if reference.source().is_layout() {
            return Err(PreheatError::Folder);
        }
        let manifest = self.parts.node.images.resolve(reference).await?;
        let (chosen, meant) = self.choose(choice, manifest)?;
        let preheat = Preheat { id: rand::random(), reference: reference.pinned(manifest), chosen, lifetime };
        {
            let mut books = self.lock();
            let nodes = meant.into_iter().map(|peer| (peer, Standing::default())).collect();
            let asked = Asked { preheat: preheat.clone(), nodes, news: Instant::now() };
            books.asked.push_back((preheat.id, asked));
            let spare = books.asked.len().saturating_sub(MAX_ASKED);
            books.asked.drain(..spare);
        }
        let id = preheat.id;
        self.parts.control.say(Word::Asked(preheat.clone())).await?;
        self.hear(preheat);
        Ok(id)
    }

    /// Tells how far the nodes are: once, or with `wait` until all are done or nothing more is heard. Ends with its listener.
    pub(crate) async fn follow(&self, id: PreheatId, wait: bool, listener: mpsc::Sender<PreheatProgress>) {
        let mut said = Instant::now();
        loop {
            let Some((progress, over)) = self.progress(id) else { return };
            if listener.send(progress).await.is_err() || over || !wait {
                return;
            }
            tokio::time::sleep(TELL).await;
            if said.elapsed() >= SAY_AGAIN {
                said = Instant::now();
                self.ask_again(id).await;
            }
        }
    }

    /// Who is meant, and which of the nodes that are known that is.
    fn choose(&self, choice: Choice, manifest: ObjectId) -> Result<(Chosen, BTreeSet<PeerId>), PreheatError> {
        let parts = &self.parts;
        // Of whom only others have told, nobody knows what it is.
        let known = parts.contacts.all().into_iter().filter(|(_, known)| !known.zone.is_empty());
        let mut nodes: BTreeMap<_, _> = known.map(|(peer, known)| (peer, (known.role, known.zone))).collect();
        nodes.insert(parts.me, (parts.role, parts.zone.clone()));
        let chosen = match choice {
            Choice::Seeds => Chosen::Seeds,
            Choice::All => Chosen::All,
            Choice::Zone(zone) => Chosen::Zone(zone),
            Choice::Count(count) if count > MAX_NAMED => return Err(PreheatError::TooMany),
            Choice::Count(count) => Chosen::Nodes(by_hash(manifest, nodes.keys().copied(), count)),
        };
        let meant = nodes.iter().filter(|(peer, (role, zone))| chosen.means(peer, *role, zone));
        let meant = meant.map(|(peer, _)| *peer).take(MAX_NODES).collect();
        Ok((chosen, meant))
    }

    /// Takes part in a preheat if this node is meant, and it is new. If it is not, and this node is asked by its name, it says again
    /// how far it is.
    fn hear(&self, preheat: Preheat) {
        if !preheat.chosen.means(&self.parts.me, self.parts.role, &self.parts.zone) {
            return;
        }
        let (preheats, mut books) = (self.clone(), self.lock());
        if let Some((id, part)) = books.heard.iter_mut().find(|(id, _)| *id == preheat.id) {
            if matches!(preheat.chosen, Chosen::Nodes(_)) && !std::mem::replace(&mut part.repeats, true) {
                let id = *id;
                tokio::spawn(async move { preheats.repeat(id).await });
            }
            return;
        }
        books.heard.push_back((preheat.id, Part::default()));
        let spare = books.heard.len().saturating_sub(MAX_HEARD);
        books.heard.drain(..spare);
        tokio::spawn(async move { preheats.take_part(preheat).await });
    }

    /// Says again what this node said last, not at the same time as the others that were asked.
    async fn repeat(&self, id: PreheatId) {
        tokio::time::sleep(STEP.mul_f64(rand::random())).await;
        let said = {
            let mut books = self.lock();
            let Some((_, part)) = books.heard.iter_mut().find(|(heard, _)| *heard == id) else { return };
            part.repeats = false;
            part.said.clone()
        };
        self.say(id, said).await;
    }

    async fn take_part(&self, preheat: Preheat) {
        let mut standing = Standing::default();
        if let Err(trouble) = self.fetch(&preheat, &mut standing).await {
            tracing::warn!(reference = %preheat.reference, "not preheated: {trouble}");
            standing.trouble = trouble.replace(char::is_control, " ");
        }
        standing.over = true;
        self.say(preheat.id, standing).await;
    }

    /// Fetches and pins the image, and says now and then how far it is.
    async fn fetch(&self, preheat: &Preheat, standing: &mut Standing) -> Result<(), String> {
        let Preheat { id, reference, .. } = preheat;
        may_read(&self.parts.registries, reference.source())?;
        // At once, so that the asked node knows of this one.
        self.say(*id, standing.clone()).await;
        // The semaphore is never closed.
        let _turn = self.turns.acquire().await;
        let pinned = self.parts.pins.pin_for(reference, preheat.lifetime.min(MAX_LIFETIME)).await;
        let (named, extended) = pinned.map_err(|error| crate::chain(&error))?;
        let (progress, mut heard) = mpsc::channel(4);
        let mut run = std::pin::pin!(prefetch::run(&self.parts.node, &named, &progress));
        let mut said = Instant::now();
        let outcome = loop {
            tokio::select! {
                outcome = &mut run => break outcome,
                Some(Ok(now)) = heard.recv() => {
                    *standing = stands(&now);
                    if said.elapsed() >= self.step() {
                        said = Instant::now();
                        self.say(*id, standing.clone()).await;
                    }
                }
            }
        };
        while let Ok(Ok(now)) = heard.try_recv() {
            *standing = stands(&now);
        }
        if let Err(error) = outcome {
            // What is not whole is not worth its room, unless somebody else has pinned it.
            if let Some(extended) = extended {
                self.parts.pins.give_back(extended).await.map_err(|error| crate::chain(&error))?;
            }
            return Err(crate::chain(&error));
        }
        Ok(())
    }

    async fn say(&self, id: PreheatId, standing: Standing) {
        // Gossip does not come back to its writer.
        self.note(self.parts.me, id, standing.clone());
        if let Some((_, part)) = self.lock().heard.iter_mut().find(|(heard, _)| *heard == id) {
            part.said = standing.clone();
        }
        if let Err(error) = self.parts.control.say(Word::Stands(id, standing)).await {
            tracing::debug!("progress of a preheat is not told: {error}");
        }
    }

    /// Asks once more: everybody, for who joined meanwhile, and by their names some of those that are not known to be done, since
    /// what they said may be lost.
    async fn ask_again(&self, id: PreheatId) {
        let again = {
            let books = self.lock();
            let Some((_, asked)) = books.asked.iter().find(|(asked, _)| *asked == id) else { return };
            let missing = asked.nodes.iter().filter(|(_, standing)| !standing.over).map(|(peer, _)| *peer);
            let named = missing.sample(&mut rand::rng(), MAX_NAMED);
            let by_name = Preheat { chosen: Chosen::Nodes(named), ..asked.preheat.clone() };
            [asked.preheat.clone(), by_name]
        };
        for preheat in again {
            if let Err(error) = self.parts.control.say(Word::Asked(preheat)).await {
                tracing::debug!("a preheat is not said again: {error}");
            }
        }
    }

    /// How often this node may speak of its progress.
    fn step(&self) -> Duration {
        let nodes = u32::try_from(self.parts.contacts.len()).unwrap_or(u32::MAX);
        STEP.max(STEP_PER_NODE.saturating_mul(nodes))
    }

    fn note(&self, peer: PeerId, id: PreheatId, standing: Standing) {
        let mut books = self.lock();
        let Some((_, asked)) = books.asked.iter_mut().find(|(asked, _)| *asked == id) else { return };
        let known = asked.nodes.get(&peer);
        // What is only said again is no news.
        if known != Some(&standing) && (asked.nodes.len() < MAX_NODES || known.is_some()) {
            asked.nodes.insert(peer, standing);
            asked.news = Instant::now();
        }
    }

    /// How far a preheat is, and whether nothing more is to be expected; `None` for one that is not in the books.
    fn progress(&self, id: PreheatId) -> Option<(PreheatProgress, bool)> {
        let books = self.lock();
        let (_, asked) = books.asked.iter().find(|(asked, _)| *asked == id)?;
        let quiet = asked.news.elapsed();
        let over = quiet >= SILENCE || (quiet >= QUIET && asked.nodes.values().all(|standing| standing.over));
        let node = |(peer, standing): (&PeerId, &Standing)| PreheatNode {
            peer: identity::to_text(peer),
            bytes: standing.bytes,
            present_bytes: standing.present_bytes,
            over: standing.over,
            trouble: standing.trouble.clone(),
        };
        let nodes = asked.nodes.iter().map(node).collect();
        Some((PreheatProgress { reference: asked.preheat.reference.to_string(), nodes }, over))
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stands(now: &PrefetchProgress) -> Standing {
    Standing { bytes: now.bytes, present_bytes: now.present_bytes, ..Standing::default() }
}

/// The first `count` nodes by a hash over image and node: the same for the same image, others for others.
fn by_hash(manifest: ObjectId, nodes: impl Iterator<Item = PeerId>, count: usize) -> Vec<PeerId> {
    let place = |peer: PeerId| {
        let hash = Sha256::new().chain_update(manifest.as_bytes()).chain_update(peer.as_bytes());
        (<[u8; 32]>::from(hash.finalize()), peer)
    };
    let places: BTreeSet<_> = nodes.map(place).collect();
    places.into_iter().map(|(_, peer)| peer).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_nodes_and_one_that_comes_or_goes_changes_little() {
        let peer = |n: u8| PeerId::new([n; 32]);
        let chosen = |image: u8, nodes: u8| by_hash(ObjectId::new([image; 32]), (0..nodes).map(peer), 4);
        assert_eq!(chosen(1, 20), chosen(1, 20));
        assert_eq!((chosen(1, 20).len(), chosen(1, 3).len()), (4, 3));
        assert!((1..10).any(|image| chosen(image, 20) != chosen(0, 20)));
        for image in 0..10 {
            let (before, after) = (chosen(image, 20), chosen(image, 21));
            assert!(after.iter().filter(|peer| !before.contains(peer)).count() <= 1);
        }
    }
}

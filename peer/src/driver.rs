//! The loop around the scheduler: events in, actions out, no decision of its own.
//!
//! One task owns the [`Scheduler`]. Readers send it wants over a bounded channel and wait for the answer; fetches that
//! it starts are tasks of their own, send their outcomes over the same channel, and never block the loop. The loop
//! itself only ever waits for the channel, for a fetch to end, for something to be dropped, or for the scheduler's next
//! deadline.
//!
//! What a key stands for is known as long as somebody has a `Stake` in it, and forgotten with the last one.

mod clock;
mod farewells;
mod targets;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, stream::FuturesUnordered};
use shoal_proto::{Bitfield, BlobId, PeerId, Priority};
use shoal_rafs::DecodedPiece;
use shoal_scheduler::{
    Action, BanReason, BlobKey, Config, Event, Item, LimitWaits, Origin as WantOrigin, RequestId, Scheduler, Time,
    WantError, WantId,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::JoinMap;

pub use self::clock::Clock;
pub(crate) use self::targets::{Stake, StakeWatch};
use self::{
    farewells::{Farewell, Farewells},
    targets::Targets,
};
use crate::{
    fetch::{Fetch, Fetcher, PeerQuestion, Target},
    pressing_news::PressingNews,
    traffic::Provenance,
};

/// Wants and outcomes that may wait for the loop; senders wait when it is full.
const QUEUE: usize = 1024;
/// Commands that the scheduler hears before it is asked what to do: wants that come together are joined.
const BATCH: usize = 256;

/// What a want ended with.
#[derive(Debug, Clone)]
pub enum Fetched {
    /// A piece, verified and decoded.
    Piece {
        /// Its chunks.
        piece: Arc<DecodedPiece>,
        /// Where it came from.
        from: Provenance,
        /// Its encoded bytes where there was no room to keep them: then they are nowhere else.
        unkept: Option<Bytes>,
    },
    /// A whole object.
    Object {
        /// Its bytes.
        bytes: Bytes,
        /// Where it came from.
        from: Provenance,
    },
    /// The hash list of a plain blob, of which nothing is verified, unless this node read the whole blob for it.
    List {
        /// As it is encoded.
        bytes: Bytes,
        /// The peer that gave it; none where this node made it.
        giver: Option<PeerId>,
    },
    /// It is in the store, or was when the scheduler last heard of it: it may have been evicted since. Who does not find it
    /// says so ([`Event::Lost`]) and asks again.
    Present,
}

impl Fetched {
    /// Whether it is in the store, or so it was thought.
    pub(crate) fn is_kept(&self) -> bool {
        !matches!(self, Self::Piece { unkept: Some(_), .. })
    }
}

/// Why a want failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WantFailed {
    /// Nobody could give it in time.
    #[error(transparent)]
    Unavailable(#[from] WantError),
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopping,
}

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// From now on pieces of this blob, or this object, can be wanted, until nobody has a stake in it any more.
    Add { by: StakeWatch, target: Target, event: Event },
    /// See [`DriverHandle::want`].
    Want { want: WantId, item: Item, priority: Priority, deadline: Time, origin: WantOrigin, reply: Reply },
    /// The scheduler hears all of these before it is asked what to do.
    Together(Vec<Command>),
    /// A fetch brought an item, verified and stored.
    Delivered { request: RequestId, item: Item, bytes: u64, fetched: Fetched },
    /// A piece was here as part of another blob, and is now here as itself.
    Found { item: Item, fetched: Fetched },
    /// A stake counts no more, whoever has it.
    Retract { by: StakeWatch },
    /// Anything else that the scheduler should know.
    Event(Event),
    /// See [`DriverHandle::keepers`].
    Keepers { id: [u8; 32], reply: oneshot::Sender<Vec<PeerId>> },
    /// See [`DriverHandle::home_duty`].
    HomeDuty { item: Item, reply: oneshot::Sender<Result<(), Vec<PeerId>>> },
}

type Reply = oneshot::Sender<Result<Fetched, WantFailed>>;

/// Talks to the loop. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DriverHandle {
    commands: mpsc::Sender<Command>,
    next: Arc<AtomicU64>,
    clock: Clock,
    pressing_news: Arc<PressingNews>,
    farewells: Arc<Farewells>,
}

impl DriverHandle {
    /// The blobs whose news should not wait.
    pub(crate) fn pressing_news(&self) -> &PressingNews {
        &self.pressing_news
    }

    /// For those that the loop itself starts: they must not keep it running.
    pub(crate) fn downgrade(&self) -> mpsc::WeakSender<Command> {
        self.commands.downgrade()
    }

    /// A stake in `key`: what is [added](Self::add) with it is known until the last clone is dropped.
    pub(crate) fn stake(&self, key: BlobKey) -> Stake {
        Stake::new(key, self.farewells.clone())
    }

    /// Makes the stake's key known with what is needed to fetch it. If it is known already, what is new is added.
    pub(crate) async fn add(&self, stake: &Stake, target: Target) {
        let event = target.event(stake.key());
        self.send(Command::Add { by: stake.watch(), target, event }).await;
    }

    /// Has a stake forgotten though there are clones of it. If it was the last one in its key, whoever still wants something of
    /// that is told that it is gone.
    pub(crate) async fn retract(&self, stake: &Stake) {
        self.send(Command::Retract { by: stake.watch() }).await;
    }

    /// Tells the scheduler something.
    pub(crate) async fn event(&self, event: Event) {
        self.send(Command::Event(event)).await;
    }

    /// Whether this node is among the homes of `item`.
    ///
    /// # Errors
    /// It is not; with those that it believes to be the zone's homes.
    pub(crate) async fn home_duty(&self, item: Item) -> Result<(), Vec<PeerId>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::HomeDuty { item, reply }).await;
        answer.await.unwrap_or(Err(Vec::new()))
    }

    /// The zone's live seed peers in the order in which they keep what goes by `id` and is no blob.
    pub(crate) async fn keepers(&self, id: [u8; 32]) -> Vec<PeerId> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Keepers { id, reply }).await;
        answer.await.unwrap_or_default()
    }

    /// Waits until `item` is present, for at most `patience`. Dropping the future takes the want back.
    ///
    /// # Errors
    /// [`WantFailed`], with every source that was tried.
    pub async fn want(
        &self,
        item: Item,
        priority: Priority,
        patience: Duration,
        origin: WantOrigin,
    ) -> Result<Fetched, WantFailed> {
        let (command, answer) = self.prepare(item, priority, patience, origin);
        self.send(command).await;
        answer.wait().await
    }

    /// As [`want`](Self::want) for several items, of which the scheduler hears at once: what lies side by side is asked for
    /// together, while of wants that come one by one each would be a request. Gives each outcome when it is there.
    pub(crate) async fn want_together(
        &self,
        items: &[Item],
        priority: Priority,
        patience: Duration,
        origin: WantOrigin,
    ) -> impl Stream<Item = (Item, Result<Fetched, WantFailed>)> {
        let (mut commands, outcomes) = (Vec::with_capacity(items.len()), FuturesUnordered::new());
        for &item in items {
            let (command, answer) = self.prepare(item, priority, patience, origin);
            commands.push(command);
            outcomes.push(async move { (item, answer.wait().await) });
        }
        self.send(Command::Together(commands)).await;
        outcomes
    }

    /// What the loop is to be told of a want, and what waits for its answer.
    fn prepare(
        &self,
        item: Item,
        priority: Priority,
        patience: Duration,
        origin: WantOrigin,
    ) -> (Command, Awaited<'_>) {
        let want = WantId(self.next.fetch_add(1, Relaxed));
        let (reply, answer) = oneshot::channel();
        let deadline = self.clock.now() + patience;
        let unwant = Unwant { want: Some(want), farewells: &self.farewells };
        (Command::Want { want, item, priority, deadline, origin, reply }, Awaited { answer, unwant })
    }

    async fn send(&self, command: Command) {
        // The loop ends only when the node stops; whoever waits for an answer then sees its reply dropped.
        let _ = self.commands.send(command).await;
    }
}

/// The answer to a want, which is taken back when this is dropped before it has come.
struct Awaited<'a> {
    /// Dropped first: a want that the loop has not taken in yet is then seen to be nobody's.
    answer: oneshot::Receiver<Result<Fetched, WantFailed>>,
    unwant: Unwant<'a>,
}

impl Awaited<'_> {
    async fn wait(mut self) -> Result<Fetched, WantFailed> {
        let outcome = (&mut self.answer).await.unwrap_or(Err(WantFailed::Stopping));
        self.unwant.want = None;
        outcome
    }
}

/// Takes a want back whose future was dropped.
struct Unwant<'a> {
    want: Option<WantId>,
    farewells: &'a Farewells,
}

impl Drop for Unwant<'_> {
    fn drop(&mut self) {
        if let Some(want) = self.want {
            self.farewells.say(Farewell::Want(want));
        }
    }
}

/// The loop's state.
pub(crate) struct Driver {
    scheduler: Scheduler,
    clock: Clock,
    inbox: Inbox,
    fetcher: Fetcher,
    targets: Targets,
    waiters: HashMap<WantId, (Item, Reply)>,
    fetches: JoinMap<RequestId, ()>,
    /// The items that the events in hand delivered, for the wants that they complete.
    delivered: HashMap<Item, Fetched>,
    /// What had to wait for limits, as far as the metrics know.
    waits: LimitWaits,
    /// How many targets there are, as far as the metrics know.
    known: usize,
}

/// The loop's end of what it shares with its handles.
pub(crate) struct Inbox {
    commands: mpsc::Receiver<Command>,
    pressing_news: Arc<PressingNews>,
    farewells: Arc<Farewells>,
}

/// The two ends of the loop's channel, made before the loop because the planes need one of them to start.
pub(crate) fn channel(clock: Clock) -> (DriverHandle, Inbox) {
    let (commands, received) = mpsc::channel(QUEUE);
    let (pressing_news, farewells) = (Arc::<PressingNews>::default(), Arc::<Farewells>::default());
    let inbox = Inbox { commands: received, pressing_news: pressing_news.clone(), farewells: farewells.clone() };
    (DriverHandle { commands, next: Arc::new(AtomicU64::new(1)), clock, pressing_news, farewells }, inbox)
}

impl Driver {
    pub(crate) fn new(config: Config, seed: [u8; 32], clock: Clock, inbox: Inbox, fetcher: Fetcher) -> Self {
        Self {
            scheduler: Scheduler::new(config, clock.now(), seed),
            clock,
            inbox,
            fetcher,
            targets: Targets::default(),
            waiters: HashMap::new(),
            fetches: JoinMap::new(),
            delivered: HashMap::new(),
            waits: LimitWaits::default(),
            known: 0,
        }
    }

    /// Runs until every handle is gone or the task is aborted; both end the fetches under way.
    pub(crate) async fn run(mut self) {
        loop {
            let timeout = self.scheduler.poll_timeout();
            let sleep = async {
                match timeout {
                    Some(at) => tokio::time::sleep(at.since(self.clock.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = self.inbox.commands.recv() => match command {
                    Some(command) => self.handle_batch(command),
                    None => return,
                },
                Some((request, ended)) = self.fetches.join_next() => {
                    // A fetch says itself, behind its last outcome, that it is finished; unless it panics.
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!("a fetch panicked: {error}");
                        self.scheduler.handle_event(self.clock.now(), Event::Finished { request });
                    }
                }
                () = self.inbox.farewells.come() => {}
                () = sleep => self.scheduler.handle_timeout(self.clock.now()),
            }
            self.hear_farewells();
            while let Some(action) = self.scheduler.poll_action(self.clock.now()) {
                self.act(action);
            }
            self.delivered.clear();
            self.count_waits();
            self.count_known();
        }
    }

    fn count_known(&mut self) {
        let known = self.targets.len();
        if std::mem::replace(&mut self.known, known) != known {
            metrics::gauge!("shoal_known_blobs").set(known as f64);
        }
    }

    fn count_waits(&mut self) {
        let (now, known) = (self.scheduler.waits(), self.waits);
        self.waits = now;
        let limits = [
            ("download", now.download, known.download),
            ("registry", now.registry, known.registry),
            ("registry_requests", now.registry_requests, known.registry_requests),
        ];
        for (limit, now, known) in limits.into_iter().filter(|(_, now, known)| now != known) {
            let seconds = (now.time - known.time).as_secs_f64();
            metrics::gauge!("shoal_limit_wait_seconds", "limit" => limit).increment(seconds);
            metrics::counter!("shoal_limit_delayed_total", "limit" => limit).increment(now.amount - known.amount);
        }
    }

    fn handle_batch(&mut self, first: Command) {
        self.handle(first);
        for _ in 1..BATCH {
            match self.inbox.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(_) => return,
            }
        }
    }

    fn handle(&mut self, command: Command) {
        let now = self.clock.now();
        let event = match command {
            Command::Add { by, target, event } => {
                if !self.targets.add(by, target) {
                    return;
                }
                event
            }
            // It was dropped before it came here.
            Command::Want { reply, .. } if reply.is_closed() => return,
            Command::Want { want, item, priority, deadline, origin, reply } => {
                self.waiters.insert(want, (item, reply));
                Event::Want { want, item, priority, deadline, origin }
            }
            Command::Together(commands) => return commands.into_iter().for_each(|command| self.handle(command)),
            Command::Delivered { request, item, bytes, fetched } => {
                return self.arrived(item, fetched, Event::Delivered { request, item, bytes });
            }
            Command::Found { item, fetched } => return self.arrived(item, fetched, Event::Present { item }),
            Command::Retract { by } => return self.forget_stake(by.key(), Some(&by)),
            Command::Event(event) => {
                if let Event::Limits(limits) = &event {
                    self.fetcher.whole_reads.set(limits.registry);
                }
                event
            }
            Command::Keepers { id, reply } => {
                // Nobody waits any more when this fails.
                let _ = reply.send(self.scheduler.keepers(&id));
                return;
            }
            Command::HomeDuty { item, reply } => {
                let rank = self.scheduler.home_rank(item.blob, item.piece);
                // Nobody waits any more when this fails.
                let _ = reply.send(rank.map(drop).ok_or_else(|| self.scheduler.zone_members()));
                return;
            }
        };
        self.scheduler.handle_event(now, event);
    }

    /// Takes note of what was dropped meanwhile.
    fn hear_farewells(&mut self) {
        for farewell in self.inbox.farewells.take() {
            match farewell {
                Farewell::Want(want) => {
                    self.waiters.remove(&want);
                    self.scheduler.handle_event(self.clock.now(), Event::Unwant { want });
                }
                Farewell::Stake(key) => self.forget_stake(key, None),
            }
        }
    }

    /// Forgets the stakes in `key` that are dropped, and one that is retracted; with the last of them the key.
    fn forget_stake(&mut self, key: BlobKey, retracted: Option<&StakeWatch>) {
        if self.targets.tidy(key, retracted) {
            self.inbox.pressing_news.remove(key);
            self.scheduler.handle_event(self.clock.now(), Event::BlobRemoved { blob: key });
        }
    }

    /// Completes the wants of an item. Without room to keep it, it is for them only: whoever wants it next has it fetched.
    fn arrived(&mut self, item: Item, fetched: Fetched, event: Event) {
        let (now, kept) = (self.clock.now(), fetched.is_kept());
        if kept {
            let here = self.scheduler.present(item.blob).map_or(0, Bitfield::count);
            self.inbox.pressing_news.arrived(item.blob, self.scheduler.holders(item) == 0, here + 1);
        }
        self.delivered.insert(item, fetched);
        self.scheduler.handle_event(now, event);
        if !kept {
            self.scheduler.handle_event(now, Event::Lost { item });
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Request { request, peer, blob, pieces, priority, source, deadline, lacks } => {
                let deadline = deadline.since(self.clock.now());
                let question = PeerQuestion { peer, source, deadline, lacks };
                self.start(request, blob, pieces, priority, Fetch::Peer(question));
            }
            Action::BackToSource { request, blob, pieces, priority, .. } => {
                self.start(request, blob, pieces, priority, Fetch::Registry);
            }
            Action::Cancel { request } => {
                self.fetches.abort(&request);
            }
            Action::Complete { want, outcome, .. } => self.complete(want, outcome),
            Action::Ban { peer, until, reason: BanReason::WrongBytes(item) } => {
                let reason = format!("wrong bytes for piece {} of {}", item.piece, BlobId::new(item.blob.id));
                self.fetcher.ban(peer, until.since(self.clock.now()), &reason);
            }
            Action::Connect { peer } => self.fetcher.connect(peer),
        }
    }

    fn start(&mut self, request: RequestId, blob: BlobKey, pieces: Vec<u32>, priority: Priority, how: Fetch) {
        if let Some(target) = self.targets.get(blob) {
            let fetch = self.fetcher.run(request, blob, target.clone(), pieces, priority, how);
            self.fetches.spawn(request, fetch);
        } else {
            // Only possible for a blob that was forgotten between the decision and now.
            self.scheduler.handle_event(self.clock.now(), Event::Finished { request });
        }
    }

    fn complete(&mut self, want: WantId, outcome: Result<(), WantError>) {
        let Some((item, reply)) = self.waiters.remove(&want) else { return };
        let fetched = || self.delivered.get(&item).cloned().unwrap_or(Fetched::Present);
        let outcome = outcome.map_err(WantFailed::from).map(|()| fetched());
        // The reader may have gone.
        let _ = reply.send(outcome);
    }
}

//! The way into the cluster: which `bootstrap_peers` to dial, and when again.
//!
//! A target is dialed until it answers, with a growing pause after each failure, and again when the connection to it
//! is lost. A node with [`ENOUGH`] connections does so only every [`REST`], which mends a cluster that fell apart,
//! without ten thousand nodes holding on to three addresses. An address that turns out to be this node's is given up; a
//! name may lead to several peers, this node among them, and to others later. Pure: addresses are dialed and names
//! resolved by the loop.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::ConnectionId};

/// Connected peers with which a node can do without its bootstrap peers.
pub(super) const ENOUGH: usize = 6;

/// Pause before a lost target is dialed again by a node that has [`ENOUGH`] peers.
const REST: Duration = Duration::from_secs(300);

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The targets and their state.
#[derive(Debug)]
pub(super) struct Bootstrap {
    targets: Vec<Target>,
    /// Dials under way, and the target that each is for.
    dials: HashMap<ConnectionId, usize>,
    /// 0 to 255, different from node to node, so that a cluster does not dial in step.
    phase: u8,
}

#[derive(Debug)]
struct Target {
    address: Multiaddr,
    state: State,
    failures: u32,
    peers: BTreeSet<PeerId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// To be dialed at `due`, or at `rest` if there are peers enough.
    Waiting { due: Instant, rest: Instant },
    /// The name is being resolved, or that many dials are under way.
    Busy { dials: usize },
    /// At least one peer is connected.
    Connected,
    /// The target is this node.
    Own,
}

impl Bootstrap {
    pub(super) fn new(addresses: Vec<Multiaddr>, phase: u8, now: Instant) -> Self {
        let state = State::Waiting { due: now, rest: now };
        let target = |address| Target { address, state, failures: 0, peers: BTreeSet::new() };
        Self { targets: addresses.into_iter().map(target).collect(), dials: HashMap::new(), phase }
    }

    /// The targets to dial now. For each the caller reports every dial that it starts
    /// ([`Self::dialing`]), then that it is through ([`Self::dialed`]).
    pub(super) fn due(&mut self, now: Instant, connected: usize) -> Vec<(usize, Multiaddr)> {
        let mut due = Vec::new();
        for (index, target) in self.targets.iter_mut().enumerate() {
            if target.wakes_at(connected).is_some_and(|at| at <= now) {
                target.state = State::Busy { dials: 0 };
                due.push((index, target.address.clone()));
            }
        }
        due
    }

    /// When `due` will have something to say.
    pub(super) fn deadline(&self, connected: usize) -> Option<Instant> {
        self.targets.iter().filter_map(|target| target.wakes_at(connected)).min()
    }

    /// A dial for the target is under way.
    pub(super) fn dialing(&mut self, index: usize, connection: ConnectionId) {
        if let State::Busy { dials } = &mut self.targets[index].state {
            *dials += 1;
            self.dials.insert(connection, index);
        }
    }

    /// All dials for the target have been started; if that is none, it has failed.
    pub(super) fn dialed(&mut self, index: usize, now: Instant) {
        if self.targets[index].state == (State::Busy { dials: 0 }) {
            self.targets[index].fail(now, self.phase);
        }
    }

    /// A dial has led to this node.
    pub(super) fn is_own(&mut self, connection: ConnectionId, now: Instant) {
        match self.dials.get(&connection) {
            Some(&index) if !is_name(&self.targets[index].address) => {
                self.dials.remove(&connection);
                self.give_up(index);
            }
            // Nor is it of use for a name.
            _ => drop(self.failed(connection, now)),
        }
    }

    /// Nothing is to be gained from this target.
    pub(super) fn give_up(&mut self, index: usize) {
        self.targets[index].state = State::Own;
    }

    /// A connection stands.
    pub(super) fn connected(&mut self, connection: ConnectionId, peer: PeerId) {
        let Some(index) = self.dials.remove(&connection) else { return };
        let target = &mut self.targets[index];
        target.peers.insert(peer);
        target.failures = 0;
        target.state = State::Connected;
    }

    /// A dial came to nothing. Says whether it was one for a target.
    pub(super) fn failed(&mut self, connection: ConnectionId, now: Instant) -> bool {
        let Some(index) = self.dials.remove(&connection) else { return false };
        let target = &mut self.targets[index];
        match &mut target.state {
            State::Busy { dials } if *dials > 1 => *dials -= 1,
            State::Busy { .. } => target.fail(now, self.phase),
            State::Waiting { .. } | State::Connected | State::Own => {}
        }
        true
    }

    /// The last connection to `peer` is gone.
    pub(super) fn lost(&mut self, peer: &PeerId, now: Instant) {
        for target in &mut self.targets {
            if target.peers.remove(peer) && target.peers.is_empty() && target.state == State::Connected {
                target.state = State::Waiting { due: now + pause(0, self.phase), rest: now + REST };
            }
        }
    }
}

impl Target {
    fn wakes_at(&self, connected: usize) -> Option<Instant> {
        match self.state {
            State::Waiting { rest, .. } if connected >= ENOUGH => Some(rest),
            State::Waiting { due, .. } => Some(due),
            State::Busy { .. } | State::Connected | State::Own => None,
        }
    }

    fn fail(&mut self, now: Instant, phase: u8) {
        let due = now + pause(self.failures, phase);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Waiting { due, rest: now + REST };
    }
}

/// Whether an address has to be resolved before it is dialed, and may lead elsewhere the next time.
fn is_name(address: &Multiaddr) -> bool {
    use Protocol::{Dns, Dns4, Dns6, Dnsaddr};
    matches!(address.iter().next(), Some(Dns(_) | Dns4(_) | Dns6(_) | Dnsaddr(_)))
}

/// Doubles with every failure; three quarters to five quarters of that, by `phase`.
fn pause(failures: u32, phase: u8) -> Duration {
    let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE);
    pause * (384 + u32::from(phase)) / 512
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(now: Instant) -> Bootstrap {
        Bootstrap::new(vec!["/ip4/127.0.0.1/tcp/1".parse().unwrap()], 128, now)
    }

    /// Dials what is due, `dials` connections per target.
    fn dial(bootstrap: &mut Bootstrap, now: Instant, dials: usize) -> Vec<ConnectionId> {
        let mut connections = Vec::new();
        for (index, _) in bootstrap.due(now, 0) {
            for _ in 0..dials {
                let connection = ConnectionId::new_unchecked(connections.len() + 1);
                bootstrap.dialing(index, connection);
                connections.push(connection);
            }
            bootstrap.dialed(index, now);
        }
        connections
    }

    #[test]
    fn failures_pause_longer_and_longer_up_to_a_bound() {
        let mut now = Instant::now();
        let mut bootstrap = one(now);
        let mut pauses = Vec::new();
        for _ in 0..10 {
            let [connection] = dial(&mut bootstrap, now, 1)[..] else { panic!("due") };
            assert_eq!((bootstrap.due(now, 0), bootstrap.deadline(0)), (vec![], None));
            bootstrap.failed(connection, now);
            let due = bootstrap.deadline(0).unwrap();
            pauses.push(due - now);
            now = due;
        }
        assert_eq!((pauses[0], pauses[1], pauses[9]), (FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE));
        assert!(pauses.is_sorted());
    }

    #[test]
    fn a_lost_target_is_dialed_again_soon_by_the_lonely_and_late_by_others() {
        let now = Instant::now();
        let mut bootstrap = one(now);
        let peer = PeerId::random();
        let [connection] = dial(&mut bootstrap, now, 1)[..] else { panic!("due") };
        bootstrap.connected(connection, peer);
        bootstrap.lost(&PeerId::random(), now);
        assert_eq!(bootstrap.deadline(0), None);
        bootstrap.lost(&peer, now);
        assert_eq!(bootstrap.deadline(0), Some(now + FIRST_PAUSE));
        assert_eq!(bootstrap.deadline(ENOUGH), Some(now + REST));
        assert!(bootstrap.due(now + FIRST_PAUSE, ENOUGH).is_empty());
        assert_eq!(bootstrap.due(now + FIRST_PAUSE, ENOUGH - 1).len(), 1);
    }

    #[test]
    fn a_name_with_many_addresses_fails_when_all_do() {
        let now = Instant::now();
        let mut bootstrap = one(now);
        let connections = dial(&mut bootstrap, now, 3);
        bootstrap.failed(connections[0], now);
        bootstrap.failed(connections[0], now);
        assert_eq!(bootstrap.deadline(0), None);
        bootstrap.connected(connections[1], PeerId::random());
        bootstrap.failed(connections[2], now);
        assert_eq!(bootstrap.deadline(0), None, "one connection is enough");
        assert!(bootstrap.dials.is_empty());
    }

    #[test]
    fn a_name_without_an_address_has_failed_and_oneself_is_given_up() {
        let now = Instant::now();
        let mut bootstrap = one(now);
        assert!(dial(&mut bootstrap, now, 0).is_empty());
        assert_eq!(bootstrap.deadline(0), Some(now + FIRST_PAUSE));
        let [connection] = dial(&mut bootstrap, now + FIRST_PAUSE, 1)[..] else { panic!("due") };
        bootstrap.is_own(connection, now);
        assert_eq!(bootstrap.deadline(0), None);
    }

    #[test]
    fn a_name_that_leads_to_this_node_among_others_is_kept() {
        let now = Instant::now();
        let mut bootstrap = Bootstrap::new(vec!["/dns/seeds/tcp/1".parse().unwrap()], 128, now);
        let [own, other] = dial(&mut bootstrap, now, 2)[..] else { panic!("due") };
        bootstrap.is_own(own, now);
        assert_eq!(bootstrap.deadline(0), None, "the other may answer yet");
        bootstrap.connected(other, PeerId::random());
        assert_eq!(bootstrap.deadline(0), None);

        // The first of many: behind the name there is nobody else so far.
        let mut bootstrap = Bootstrap::new(vec!["/dns/seeds/tcp/1".parse().unwrap()], 128, now);
        let [own] = dial(&mut bootstrap, now, 1)[..] else { panic!("due") };
        bootstrap.is_own(own, now);
        assert_eq!(bootstrap.deadline(0), Some(now + FIRST_PAUSE));
    }
}

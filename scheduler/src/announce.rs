//! How often a node tells its neighbours what is new.
//!
//! An announcement costs a packet for each neighbour and some work at both ends, however little it says: with 35 neighbours on
//! links of 20 Mbit/s, ten a second were as many packets as the pieces themselves. So little news waits longer where many listen,
//! unless it is of what none of them has: the first copies of a piece are what a swarm grows by, and each copy of a copy would
//! wait again. Such news goes out as soon as it does not cost too many packets.

use std::time::Duration;

/// How soon it is told of a piece that no neighbour had: those that come at the same time are told together.
pub const PROMPT: Duration = Duration::from_millis(2);
/// Shortest time between two announcements of a blob where no neighbour had what is new.
const RARE_INTERVAL: Duration = Duration::from_millis(10);
/// The same for each that listens: fifty thousand packets a second at most.
const PACKET: Duration = Duration::from_micros(20);
/// Shortest time between two announcements of other news, and longest where no neighbour had it.
const INTERVAL: Duration = Duration::from_millis(100);
/// Neighbours that are told that often, whatever there is to tell.
const FEW: usize = 8;
/// How many times as long little news waits at most.
const SLOWEST: usize = 5;
/// News of this part of a blob is not little.
const MUCH: u32 = 32;

/// The time from one announcement to the next, when `news` of a blob's `pieces` are new, some of them were `rare` when they came,
/// and so many neighbours listen.
pub fn announce_interval(news: u32, pieces: u32, rare: bool, listeners: usize) -> Duration {
    if rare {
        (PACKET * u32::try_from(listeners).unwrap_or(u32::MAX)).clamp(RARE_INTERVAL, INTERVAL)
    } else if news >= pieces.div_ceil(MUCH) {
        INTERVAL
    } else {
        INTERVAL * (listeners / FEW).clamp(1, SLOWEST) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_news_waits_where_many_listen() {
        let millis = |news, listeners| announce_interval(news, 640, false, listeners).as_millis();
        assert_eq!([millis(1, 0), millis(1, 15), millis(1, 16), millis(19, 35)], [100, 100, 200, 400]);
        assert_eq!([millis(1, 4000), millis(20, 4000)], [500, 100]);
    }

    #[test]
    fn what_nobody_had_is_told_as_soon_as_packets_allow() {
        let millis = |listeners| announce_interval(1, 640, true, listeners).as_millis();
        assert_eq!([0, 24, 40, 100, 4000, usize::MAX].map(millis), [10, 10, 10, 10, 80, 100]);
    }
}

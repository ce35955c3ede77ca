//! How often a node tells its neighbours what is new.
//!
//! An announcement costs a packet for each neighbour and some work at both ends, however little it says: with 35 neighbours on
//! links of 20 Mbit/s, ten a second were as many packets as the pieces themselves. So little news waits longer where many listen,
//! unless it presses. That is news of what none of them has: the first copies of a piece are what a swarm grows by, and each copy of
//! a copy would wait again. And it is what adds much to what they know of: nobody asks a node that has told nothing, and when a
//! crowd starts, that is everyone. Such news goes out as soon as it does not cost too many packets; of the second kind there is
//! little in all, as what is told grows by a quarter each time. (2,500 nodes of the simulator's `flash-crowd-10k`: without the
//! second half of them are idle until 0.9 s after the start, with it until 0.5 s.)

use std::time::Duration;

/// How soon pressing news is told: what comes at the same time is told together.
pub const PROMPT: Duration = Duration::from_millis(2);
/// Shortest time between two announcements of a blob where the news presses.
const PRESSING_INTERVAL: Duration = Duration::from_millis(10);
/// The same for each that listens: fifty thousand packets a second at most.
const PACKET: Duration = Duration::from_micros(20);
/// Shortest time between two announcements of other news, and longest of what presses.
const INTERVAL: Duration = Duration::from_millis(100);
/// Neighbours that are told that often, whatever there is to tell.
const FEW: usize = 8;
/// How many times as long little news waits at most.
const SLOWEST: usize = 5;
/// News of this part of a blob is not little.
const MUCH: u32 = 32;
/// What is more than this part of what neighbours know of presses.
const GROWTH: u32 = 4;

/// Whether so much `news` of a blob should not wait, when neighbours have been told of so many pieces; `unheld` if none of them had
/// one of the new ones.
pub fn is_pressing(unheld: bool, news: u32, told: u32) -> bool {
    unheld || news.saturating_mul(GROWTH) > told
}

/// The time from one announcement to the next, when `news` of a blob's `pieces` are new, they press or not, and so many
/// neighbours listen.
pub fn announce_interval(news: u32, pieces: u32, pressing: bool, listeners: usize) -> Duration {
    if pressing {
        (PACKET * u32::try_from(listeners).unwrap_or(u32::MAX)).clamp(PRESSING_INTERVAL, INTERVAL)
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
    fn what_nobody_had_presses_and_what_is_much_of_all() {
        assert!(is_pressing(true, 1, 1000) && is_pressing(false, 1, 0) && is_pressing(false, 11, 40));
        assert!(!is_pressing(false, 10, 40) && !is_pressing(false, 0, 0) && is_pressing(false, u32::MAX, 40));
    }

    #[test]
    fn what_presses_is_told_as_soon_as_packets_allow() {
        let millis = |listeners| announce_interval(1, 640, true, listeners).as_millis();
        assert_eq!([0, 24, 40, 100, 4000, usize::MAX].map(millis), [10, 10, 10, 10, 80, 100]);
    }
}

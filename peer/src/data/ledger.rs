//! What a request may still be answered with: the check on every frame of an answer, before its payload is read.
//!
//! Pure. Each piece asked for is answered once, by its bytes or by not-have, one piece after the other; its parts
//! come in order and add up to a total that is within what the asker expects of it.

use shoal_proto::{Data, Message, Status};

/// How an answer breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It names another request.
    #[error("an answer to request {found:?} on the stream of request {expected}")]
    OtherRequest {
        /// The request of the stream.
        expected: u64,
        /// What the answer names.
        found: Option<u64>,
    },
    /// The piece was not asked for.
    #[error("piece {0} was not asked for")]
    NotAsked(u32),
    /// The piece was answered before.
    #[error("piece {0} is answered twice")]
    Twice(u32),
    /// The piece is longer than it can be.
    #[error("piece {piece} of {total} bytes, where at most {limit} are expected")]
    TooLong {
        /// The piece.
        piece: u32,
        /// The length declared.
        total: u64,
        /// The greatest length that the asker expects.
        limit: u64,
    },
    /// A part does not follow the one before.
    #[error("piece {piece} goes on at {found} of {total} bytes, not at {expected}")]
    OutOfOrder {
        /// The piece.
        piece: u32,
        /// Where the next part should start.
        expected: u64,
        /// Where it starts.
        found: u64,
        /// The length declared.
        total: u64,
    },
    /// Another piece is not complete.
    #[error("piece {0} is not complete, and something else follows")]
    Unfinished(u32),
    /// Said to be complete, and is not.
    #[error("the answer counts as complete without piece {0}")]
    Incomplete(u32),
    /// A message that is no answer.
    #[error("a message that is no answer")]
    NoAnswer,
}

/// The state of one answer.
#[derive(Debug)]
pub(super) struct Ledger {
    request: u64,
    first: u32,
    limits: Vec<u64>,
    answered: Vec<bool>,
    open: Option<Open>,
}

/// The piece whose parts are coming.
#[derive(Debug, Clone, Copy)]
struct Open {
    piece: u32,
    total: u64,
    next: u64,
}

impl Ledger {
    /// For a request of as many pieces as there are limits, from `first` on.
    pub(super) fn new(request: u64, first: u32, limits: Vec<u64>) -> Self {
        let answered = vec![false; limits.len()];
        Self { request, first, limits, answered, open: None }
    }

    /// Checks the next message.
    pub(super) fn check(&mut self, message: &Message) -> Result<(), Violation> {
        let found = message.request();
        if found != Some(self.request) {
            return Err(Violation::OtherRequest { expected: self.request, found });
        }
        match (message, self.open) {
            (Message::Data(data), _) => self.data(data),
            // Who cannot go on may say so at any time.
            (Message::End { status, .. }, Some(_)) if *status != Status::Complete => Ok(()),
            (_, Some(open)) => Err(Violation::Unfinished(open.piece)),
            (&Message::NotHave { piece, .. }, None) => self.answer(piece),
            (Message::End { status: Status::Complete, .. }, None) => self.complete(),
            (
                Message::Pending { .. }
                | Message::Busy { .. }
                | Message::NotMyHome { .. }
                | Message::CannotSource { .. }
                | Message::End { .. },
                None,
            ) => Ok(()),
            _ => Err(Violation::NoAnswer),
        }
    }

    fn data(&mut self, data: &Data) -> Result<(), Violation> {
        let &Data { piece, total, offset, .. } = data;
        let expected = match self.open {
            Some(open) if open.piece != piece => return Err(Violation::Unfinished(open.piece)),
            Some(open) if open.total != total => {
                return Err(Violation::OutOfOrder { piece, expected: open.next, found: offset, total });
            }
            Some(open) => open.next,
            None => {
                let limit = self.limits[self.unanswered(piece)?];
                if total > limit {
                    return Err(Violation::TooLong { piece, total, limit });
                }
                0
            }
        };
        if offset != expected {
            return Err(Violation::OutOfOrder { piece, expected, found: offset, total });
        }
        if data.is_last() {
            self.open = None;
            self.answer(piece)
        } else {
            self.open = Some(Open { piece, total, next: offset + u64::from(data.length) });
            Ok(())
        }
    }

    fn unanswered(&self, piece: u32) -> Result<usize, Violation> {
        let index = piece.checked_sub(self.first).map(|index| index as usize);
        let index = index.filter(|index| *index < self.limits.len()).ok_or(Violation::NotAsked(piece))?;
        if self.answered[index] { Err(Violation::Twice(piece)) } else { Ok(index) }
    }

    fn answer(&mut self, piece: u32) -> Result<(), Violation> {
        let index = self.unanswered(piece)?;
        self.answered[index] = true;
        Ok(())
    }

    /// Whether every piece was answered, otherwise the first that was not.
    pub(super) fn complete(&self) -> Result<(), Violation> {
        match self.answered.iter().position(|answered| !answered) {
            Some(index) => Err(Violation::Incomplete(self.first + index as u32)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part(piece: u32, total: u64, offset: u64, length: u32) -> Message {
        Message::Data(Data { request: 9, piece, total, offset, length })
    }

    fn check(messages: &[Message]) -> Result<(), Violation> {
        let mut ledger = Ledger::new(9, 5, vec![10, 20, 0]);
        messages.iter().try_for_each(|message| ledger.check(message))
    }

    #[test]
    fn a_good_answer_passes() {
        let end = Message::End { request: 9, status: Status::Complete };
        let pending = Message::Pending { request: 9, eta: std::time::Duration::ZERO };
        let not_have = Message::NotHave { request: 9, piece: 5 };
        assert_eq!(check(&[pending, part(6, 20, 0, 8), part(6, 20, 8, 12), not_have, part(7, 0, 0, 0), end]), Ok(()));
    }

    #[test]
    fn what_was_not_asked_for_or_not_like_this_is_refused() {
        let end = Message::End { request: 9, status: Status::Complete };
        let other = Message::NotHave { request: 8, piece: 5 };
        assert_eq!(check(&[other]), Err(Violation::OtherRequest { expected: 9, found: Some(8) }));
        assert_eq!(check(&[part(4, 1, 0, 1)]), Err(Violation::NotAsked(4)));
        assert_eq!(check(&[part(8, 1, 0, 1)]), Err(Violation::NotAsked(8)));
        assert_eq!(check(&[part(5, 11, 0, 1)]), Err(Violation::TooLong { piece: 5, total: 11, limit: 10 }));
        assert_eq!(check(&[part(5, 10, 0, 10), part(5, 10, 0, 10)]), Err(Violation::Twice(5)));
        assert_eq!(check(&[part(5, 10, 0, 4), part(6, 20, 0, 4)]), Err(Violation::Unfinished(5)));
        assert_eq!(check(&[part(5, 10, 0, 4), end.clone()]), Err(Violation::Unfinished(5)));
        let again = Violation::OutOfOrder { piece: 5, expected: 4, found: 0, total: 10 };
        assert_eq!(check(&[part(5, 10, 0, 4), part(5, 10, 0, 4)]), Err(again));
        assert_eq!(check(&[part(5, 10, 0, 10), end]), Err(Violation::Incomplete(6)));
        assert_eq!(check(&[Message::Cancel { request: 9 }]), Err(Violation::NoAnswer));
    }

    proptest! {
        /// Whatever the parts, no more bytes of a piece are let in than its limit, and no piece completes twice.
        #[test]
        fn never_more_than_the_limits(
            parts in prop::collection::vec((0_u32..4, 0_u64..24, 0_u64..24, 0_u32..12), 0..40),
        ) {
            let limits = [10, 20, 5];
            let mut ledger = Ledger::new(9, 1, limits.to_vec());
            let mut taken = [0_u64; 3];
            for (piece, total, offset, length) in parts {
                if offset + u64::from(length) <= total && ledger.check(&part(piece, total, offset, length)).is_ok() {
                    taken[piece as usize - 1] += u64::from(length);
                }
            }
            for (taken, limit) in taken.iter().zip(limits) {
                prop_assert!(*taken <= limit);
            }
        }
    }
}

//! The requests that are open on a connection, both ways, and to whom each frame belongs.
//!
//! Who asks says what its answer may have at most: that many bytes and parts are let in, then the connection ends. What was
//! cancelled stays open until the peer ends it, because what it sent before it heard of that is still on its way. No IO.

use std::collections::HashMap;

use bytes::Bytes;
use shoal_proto::{Data, MAX_OPEN, Message};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::PART;
use crate::data::frames::FrameError;

/// Messages of an answer beside those that carry a piece: patience, and the end.
const EXTRA: usize = 64;
/// What the peer says to a request of its own after the request: that it is cancelled.
const AFTER_REQUEST: usize = 2;

/// A message and its payload.
pub(super) type Frame = (Message, Bytes);
/// The frames of one stream.
pub(super) type Frames = mpsc::Receiver<Result<Frame, FrameError>>;

/// A request of this side.
#[derive(Debug)]
struct Asked {
    /// Nobody listens once it is cancelled.
    frames: Option<mpsc::Sender<Result<Frame, FrameError>>>,
    /// Payload that may still come.
    allowance: u64,
    _open: OwnedSemaphorePermit,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Streams {
    asked: HashMap<u64, Asked>,
    served: HashMap<u64, mpsc::Sender<Result<Frame, FrameError>>>,
    ended: bool,
}

impl Streams {
    /// Opens a request of this side; `None` when the connection has ended.
    pub(super) fn ask(&mut self, request: u64, limits: &[u64], open: OwnedSemaphorePermit) -> Option<Frames> {
        if self.ended {
            return None;
        }
        let allowance = limits.iter().fold(0, |sum: u64, limit| sum.saturating_add(*limit));
        // Parts may be half as long as ours, and the last of each piece shorter.
        let parts = usize::try_from(allowance / (PART as u64 / 2)).unwrap_or(usize::MAX);
        let (frames, receiver) = mpsc::channel(parts.saturating_add(2 * limits.len() + EXTRA).min(1 << 20));
        self.asked.insert(request, Asked { frames: Some(frames), allowance, _open: open });
        Some(receiver)
    }

    /// Stops listening to an answer; whether the peer is to be told.
    pub(super) fn cancel(&mut self, request: u64) -> bool {
        self.asked.get_mut(&request).is_some_and(|asked| asked.frames.take().is_some())
    }

    /// Whether the payload of `data` may be read: it belongs to a request that expects as much.
    pub(super) fn expect(&mut self, data: &Data) -> Result<(), FrameError> {
        let asked = self.asked.get_mut(&data.request).ok_or(FrameError::Misplaced("data that was not asked for"))?;
        let left = asked.allowance.checked_sub(data.length.into());
        asked.allowance = left.ok_or(FrameError::Misplaced("more data than was asked for"))?;
        Ok(())
    }

    /// Hands a frame to whom it belongs; gives the stream of a request that it opens.
    pub(super) fn deliver(&mut self, (message, payload): Frame) -> Result<Option<(u64, Frames)>, FrameError> {
        match &message {
            Message::Request(request) => {
                let id = request.id;
                if self.served.len() >= MAX_OPEN {
                    return Err(FrameError::Misplaced("more requests than may be open"));
                }
                let (frames, receiver) = mpsc::channel(AFTER_REQUEST);
                frames.try_send(Ok((message, payload))).expect("an empty channel has room");
                if self.served.insert(id, frames).is_some() {
                    return Err(FrameError::Misplaced("a request under the number of another"));
                }
                Ok(Some((id, receiver)))
            }
            Message::Cancel { request } => {
                // It may have been answered meanwhile; and a second one says nothing new.
                if let Some(served) = self.served.get(request) {
                    let _ = served.try_send(Ok((message, payload)));
                }
                Ok(None)
            }
            _ => self.answer(message, payload).map(|()| None),
        }
    }

    fn answer(&mut self, message: Message, payload: Bytes) -> Result<(), FrameError> {
        let misplaced = FrameError::Misplaced("an answer to nothing that was asked");
        let request = message.request().ok_or(FrameError::Misplaced("a message that is no answer"))?;
        let asked = self.asked.get(&request).ok_or(misplaced)?;
        let (over, patience) = (ends(&message), matches!(message, Message::Pending { .. }));
        let full = asked.frames.as_ref().is_some_and(|frames| {
            matches!(frames.try_send(Ok((message, payload))), Err(mpsc::error::TrySendError::Full(_)))
        });
        if over {
            self.asked.remove(&request);
        }
        if full && !patience { Err(FrameError::Misplaced("more parts than an answer can have")) } else { Ok(()) }
    }

    /// A request of the peer was answered to the end.
    pub(super) fn answered(&mut self, request: u64) {
        self.served.remove(&request);
    }

    /// The connection has ended: whoever listens to it hears so.
    pub(super) fn end(&mut self) {
        *self = Self { ended: true, ..Self::default() };
    }
}

/// Whether nothing follows this answer.
pub(super) fn ends(message: &Message) -> bool {
    matches!(
        message,
        Message::End { .. } | Message::Busy { .. } | Message::NotMyHome { .. } | Message::CannotSource { .. }
    )
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use shoal_proto::{Asked, ImageSource, ObjectId, ObjectKind, Priority, Request, Status};
    use tokio::sync::Semaphore;

    use super::*;

    fn streams(limits: &[u64]) -> (Streams, Frames, Arc<Semaphore>) {
        let open = Arc::new(Semaphore::new(1));
        let mut streams = Streams::default();
        let permit = open.clone().try_acquire_owned().unwrap();
        let frames = streams.ask(1, limits, permit).unwrap();
        (streams, frames, open)
    }

    fn data(request: u64, length: u32) -> Data {
        Data { request, piece: 0, total: u64::from(length), offset: 0, length }
    }

    fn end(request: u64) -> Frame {
        (Message::End { request, status: Status::Cancelled }, Bytes::new())
    }

    fn request(id: u64) -> Frame {
        let what = Asked::Object { id: ObjectId::new([1; 32]), kind: ObjectKind::Blob };
        let image = ImageSource { registry: "r".into(), repository: "a".into() };
        let deadline = Duration::from_secs(1);
        let request = Request { id, image, what, priority: Priority::Prefetch, source: false, deadline, lacks: 0 };
        (Message::Request(request), Bytes::new())
    }

    #[test]
    fn answers_reach_who_asked_and_nobody_else() {
        let (mut streams, mut frames, open) = streams(&[10]);
        assert!(streams.expect(&data(2, 1)).is_err() && streams.deliver(end(2)).is_err());
        assert!(streams.deliver((Message::Hello(crate::data::tests::hello("x", b"")), Bytes::new())).is_err());
        streams.deliver(end(1)).unwrap();
        assert_eq!(frames.try_recv().unwrap().unwrap(), end(1));
        assert!(frames.try_recv().is_err() && streams.deliver(end(1)).is_err());
        assert_eq!(open.available_permits(), 1);
    }

    #[test]
    fn no_more_is_let_in_than_was_asked_for_cancelled_or_not() {
        for cancelled in [false, true] {
            let (mut streams, _frames, open) = streams(&[10, 10]);
            assert!(!cancelled || streams.cancel(1));
            assert!(!cancelled || !streams.cancel(1), "the peer is told once");
            streams.expect(&data(1, 15)).unwrap();
            assert!(streams.expect(&data(1, 6)).is_err());
            streams.expect(&data(1, 5)).unwrap();
            assert_eq!(open.available_permits(), 0);
            streams.deliver(end(1)).unwrap();
            assert_eq!(open.available_permits(), 1);
        }
    }

    #[test]
    fn a_flood_of_parts_ends_the_connection_and_one_of_patience_is_dropped() {
        let (mut streams, _frames, _open) = streams(&[1 << 20]);
        let pending = || (Message::Pending { request: 1, eta: Duration::ZERO }, Bytes::new());
        let part = || (Message::Data(data(1, 1)), Bytes::from_static(b"x"));
        (0..10_000).for_each(|_| assert!(streams.deliver(pending()).is_ok()));
        assert!(streams.deliver(part()).is_err());
    }

    #[test]
    fn the_peers_requests_are_bounded_and_end() {
        let mut streams = Streams::default();
        let mut open: Vec<_> =
            (0..MAX_OPEN as u64).map(|id| streams.deliver(request(id)).unwrap().unwrap()).collect();
        assert!(streams.deliver(request(MAX_OPEN as u64)).is_err());
        streams.answered(7);
        assert!(streams.deliver(request(8)).is_err(), "its number is taken");
        streams.deliver(request(7)).unwrap().unwrap();
        let cancel = (Message::Cancel { request: 9 }, Bytes::new());
        (0..10).for_each(|_| assert!(streams.deliver(cancel.clone()).unwrap().is_none()));
        let (_, frames) = &mut open[9];
        assert!(matches!(frames.try_recv(), Ok(Ok((Message::Request(_), _)))));
        assert_eq!(frames.try_recv().unwrap().unwrap(), cancel);
        streams.end();
        assert!(matches!(open[10].1.try_recv(), Ok(Ok((Message::Request(_), _)))));
        assert!(matches!(open[10].1.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }
}

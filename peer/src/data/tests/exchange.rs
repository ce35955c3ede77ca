//! What peers that keep the protocol do for each other.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn hellos_are_exchanged_and_memberships_count_for_more() {
    for transport in TRANSPORTS {
        let (mut a, mut b) = (Node::start(transport, "a", serving(1)), Node::start(transport, "b", serving(1)));
        a.connect(&b);
        let (peer, hello) = a.up().await;
        assert_eq!((peer, hello.name.as_str()), (b.peer, "b"));
        assert_eq!((hello.role, hello.zone.as_str()), (Role::Seed, "proved"));
        assert_eq!(hello.data_addresses, vec![b.address()], "port 0 becomes the real one");
        let (peer, hello) = b.up().await;
        assert_eq!((peer, hello.name.as_str()), (a.peer, "a"));
        assert_eq!(hello.labels["rack"], "r1");
        let status = &a.plane.connections()[0];
        assert_eq!((status.peer, status.dialled, status.address), (b.peer, true, b.address()));
        assert!(!b.plane.connections()[0].dialled);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_arrive_in_order() {
    for transport in TRANSPORTS {
        let (a, mut b) = pair(transport, serving(1), serving(1)).await;
        let (bootstrap, blob) = (ObjectId::new([1; 32]), BlobId::new([2; 32]));
        let mut pieces = shoal_proto::Bitfield::new(100_000);
        pieces.insert_range(17..77_000);
        let have = Have { bootstrap, blob, full: true, first: 0, pieces };
        let contacts = vec![Contact { peer: PeerId::new([4; 32]), addresses: vec![a.address()] }];
        a.plane.notify(b.peer, Message::Interest { bootstrap, blob }).expect("room for a notice");
        a.plane.notify(b.peer, Message::Have(have.clone())).expect("room for a notice");
        a.plane.notify(b.peer, Message::Peers { blob, contacts: contacts.clone() }).expect("room for a notice");
        assert_eq!(b.event().await, PeerEvent::Interest { peer: a.peer, bootstrap, blob });
        assert_eq!(b.event().await, PeerEvent::Have { peer: a.peer, have });
        assert_eq!(b.event().await, PeerEvent::Peers { peer: a.peer, blob, contacts });
        assert_eq!(a.plane.notify(b.peer, Message::Cancel { request: 1 }), Err(NotifyError::NotANotice));
        let nobody = PeerId::new([9; 32]);
        assert_eq!(a.plane.notify(nobody, Message::Interest { bootstrap, blob }), Err(NotifyError::NotConnected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_answer_arrives() {
    for transport in TRANSPORTS {
        let alternate =
            Contact { peer: PeerId::new([5; 32]), addresses: vec![SocketAddr::from(([10, 0, 0, 1], 4802))] };
        let member = PeerId::new([6; 32]);
        let (contact, second) = (alternate.clone(), Duration::from_secs(1));
        let service = Answering(move |peer: PeerContext, request: Request, mut answers: AnswerSender| {
            assert_eq!(peer.zone, "proved");
            let contact = contact.clone();
            tokio::spawn(async move {
                match request.what {
                    Asked::Object { .. } => {
                        answers.send_data(0, piece(0, 3 << 20)).await?;
                        answers.end().await
                    }
                    Asked::Pieces { first: 0, .. } => {
                        answers.pending(second).await?;
                        answers.not_have(1).await?;
                        answers.send_data(0, piece(0, 300_000)).await?;
                        answers.send_data(2, Bytes::new()).await?;
                        answers.end().await
                    }
                    Asked::Pieces { first: 1, .. } => answers.busy(second, vec![contact]).await,
                    Asked::Pieces { first: 2, .. } => answers.not_my_home(vec![member]).await,
                    Asked::Pieces { first: 3, .. } => answers.cannot_source("no credentials".into()).await,
                    Asked::Pieces { first: 4, .. } => answers.refuse().await,
                    Asked::Pieces { first: 5, .. } => answers.end().await,
                    Asked::Pieces { .. } => Ok(()),
                }
            });
        });
        let (a, b) = pair(transport, serving(1), Arc::new(service)).await;
        let object = asking(Asked::Object { id: ObjectId::new([7; 32]), kind: ObjectKind::Blob }, Priority::OnDemand);
        let answers = a.plane.request(b.peer, object, vec![3 << 20]).await.expect("connected");
        let heard: Vec<_> = within(answers.collect()).await;
        let (whole, coming) = heard.split_last().expect("an answer");
        assert!(*whole == Ok(Answer::Data { piece: 0, bytes: piece(0, 3 << 20) }));
        assert!(!coming.is_empty() && coming.iter().all(|part| *part == Ok(Answer::Progress)), "{coming:?}");
        assert_eq!(
            all(a.ask(b.peer, 0, &[300_000, 10, 10]).await).await,
            vec![
                Ok(Answer::Pending { eta: second }),
                Ok(Answer::NotHave { piece: 1 }),
                Ok(Answer::Data { piece: 0, bytes: piece(0, 300_000) }),
                Ok(Answer::Data { piece: 2, bytes: Bytes::new() }),
            ]
        );
        let busy = Answer::Busy { retry_after: second, alternates: vec![alternate] };
        assert_eq!(all(a.ask(b.peer, 1, &[1]).await).await, vec![Ok(busy)]);
        assert_eq!(all(a.ask(b.peer, 2, &[1]).await).await, vec![Ok(Answer::NotMyHome { members: vec![member] })]);
        let reason = "no credentials".to_owned();
        assert_eq!(all(a.ask(b.peer, 3, &[1]).await).await, vec![Ok(Answer::CannotSource { reason })]);
        let ended = |status| vec![Err(AnswerError::Ended(status))];
        assert_eq!(all(a.ask(b.peer, 4, &[1]).await).await, ended(shoal_proto::Status::Refused));
        assert_eq!(all(a.ask(b.peer, 5, &[1]).await).await, ended(shoal_proto::Status::Failed));
        let dropped = all(a.ask(b.peer, 6, &[1]).await).await;
        assert!(matches!(dropped[..], [Err(AnswerError::Lost(_) | AnswerError::Ended(_))]), "{dropped:?}");
        assert!(a.plane.is_connected(b.peer));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_are_exact_to_the_byte() {
    for transport in TRANSPORTS {
        const LENGTH: usize = 1 << 20;
        let (a, b) = pair(transport, serving(1), serving(LENGTH)).await;
        let run = |first: u32, priority| {
            let (plane, peer) = (a.plane.clone(), b.peer);
            async move {
                let limits = vec![LENGTH as u64; 4];
                let answers = plane.request(peer, request(first, 4, priority), limits).await.expect("connected");
                for (number, answer) in (first..).zip(all(answers).await) {
                    assert!(
                        answer == Ok(Answer::Data { piece: number, bytes: piece(number, LENGTH) }),
                        "piece {number}"
                    );
                }
            }
        };
        let runs = (0..16).map(|n| run(n * 4, if n % 2 == 0 { Priority::OnDemand } else { Priority::Prefetch }));
        futures::future::join_all(runs).await;
        assert_eq!(a.plane.connections()[0].received_bytes, 64 << 20);
        assert_eq!(b.plane.connections()[0].sent_bytes, 64 << 20);
        eventually(|| b.plane.connections()[0].requests == 0).await;
    }
}

/// More than a connection takes at once, so that everything waits for room, the ends of answers too.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_wait_for_room_are_whole() {
    const LENGTH: usize = 1 << 20;
    for transport in TRANSPORTS {
        let bytes = piece(0, LENGTH);
        let service = Answering(move |_, _, mut answers: AnswerSender| {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                for number in 0..16 {
                    answers.reserve(LENGTH).await?;
                    answers.send_data(number, bytes.clone()).await?;
                }
                answers.end().await
            });
        });
        let (a, b) = pair(transport, serving(1), Arc::new(service)).await;
        let ask = async |_| {
            let limits = vec![LENGTH as u64; 16];
            let asked = a.plane.request(b.peer, request(0, 16, Priority::Prefetch), limits).await;
            let answers = all(asked.expect("connected")).await;
            assert!(answers.len() == 16 && answers.iter().all(Result::is_ok), "{answers:?}");
        };
        futures::stream::iter(0..32).map(ask).buffer_unordered(4).for_each(async |()| {}).await;
    }
}

/// What is too large to be in memory whole, as an object, is sent in parts; whoever asks sees one piece.
#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_is_sent_in_parts_is_one() {
    const LENGTH: usize = (5 << 20) + 7;
    for transport in TRANSPORTS {
        let bytes = piece(0, LENGTH);
        let service = Answering(move |_, _, mut answers: AnswerSender| {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                for start in (0..LENGTH).step_by(1 << 20) {
                    let part = bytes.slice(start..LENGTH.min(start + (1 << 20)));
                    answers.reserve(part.len()).await?;
                    answers.send_part(0, LENGTH as u64, start as u64, part).await?;
                }
                answers.end().await
            });
        });
        let (a, b) = pair(transport, serving(1), Arc::new(service)).await;
        let answers = all(a.ask(b.peer, 0, &[LENGTH as u64]).await).await;
        assert_eq!(answers, [Ok(Answer::Data { piece: 0, bytes: piece(0, LENGTH) })]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_answer_cancels_at_the_server() {
    for transport in TRANSPORTS {
        let (service, mut given_up) = holding();
        let (a, b) = pair(transport, serving(1), service).await;
        let mut answers = a.ask(b.peer, 0, &[1]).await;
        assert!(matches!(within(answers.next()).await, Some(Ok(Answer::Pending { .. }))));
        drop(answers);
        within(given_up.recv()).await.expect("the service is told");
        eventually(|| a.plane.connections()[0].requests == 0 && b.plane.connections()[0].requests == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_places_says_busy_and_keeps_some_for_readers() {
    for transport in TRANSPORTS {
        let (service, _given_up) = holding();
        let limits = Limits { requests_per_peer: 4, ..Limits::default() };
        let (mut a, b) =
            (Node::start(transport, "a", serving(1)), Node::with(transport, "b", service, MEMBER, limits));
        a.connect(&b);
        a.up().await;
        let mut open = Vec::new();
        let mut first = async |priority| {
            let mut answers = a.plane.request(b.peer, request(0, 1, priority), vec![1]).await.expect("connected");
            let answer = within(answers.next()).await.expect("an answer").expect("a good one");
            open.push(answers);
            matches!(answer, Answer::Busy { .. })
        };
        for _ in 0..3 {
            assert!(!first(Priority::Prefetch).await);
        }
        assert!(first(Priority::Prefetch).await);
        assert!(!first(Priority::OnDemand).await);
        assert!(first(Priority::OnDemand).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_is_down_and_its_answers_end() {
    for transport in TRANSPORTS {
        let (service, _given_up) = holding();
        let (mut a, b) = pair(transport, serving(1), service).await;
        let mut answers = a.ask(b.peer, 0, &[1]).await;
        assert!(matches!(within(answers.next()).await, Some(Ok(Answer::Pending { .. }))));
        b.plane.stop().await;
        assert!(matches!(a.down().await, Gone::Theirs { why: Closing::Stopping, .. }));
        // Its own end of the answer may be given up before the connection is.
        let ended = all(answers).await;
        assert!(matches!(ended[..], [Err(AnswerError::Lost(_) | AnswerError::Ended(_))]), "{ended:?}");
        let again = a.plane.request(b.peer, request(0, 1, Priority::OnDemand), vec![1]).await;
        assert!(matches!(again, Err(RequestError::NotConnected(_))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_must_fit_the_request() {
    for transport in TRANSPORTS {
        let (a, b) = pair(transport, serving(1), serving(1)).await;
        let wrong = a.plane.request(b.peer, request(0, 2, Priority::OnDemand), vec![1]).await;
        assert!(matches!(wrong, Err(RequestError::Limits { pieces: 2, limits: 1 })));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unused_connections_close_and_used_ones_do_not() {
    for transport in TRANSPORTS {
        let limits = Limits { idle: Duration::from_millis(200), ..Limits::default() };
        let (service, _given_up) = holding();
        let (mut a, mut b) =
            (Node::with(transport, "a", serving(1), MEMBER, limits), Node::start(transport, "b", service));
        a.connect(&b);
        a.up().await;
        b.up().await;
        let mut answers = a.ask(b.peer, 0, &[1]).await;
        assert!(matches!(within(answers.next()).await, Some(Ok(Answer::Pending { .. }))));
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert!(a.plane.is_connected(b.peer));
        drop(answers);
        assert!(matches!(a.down().await, Gone::Ours { why: Closing::Idle, .. }));
        assert!(matches!(b.down().await, Gone::Theirs { why: Closing::Idle, .. }));
    }
}

//! A node that has had to do with many images remembers few of them: what nobody uses is forgotten, by the scheduler too.

use std::{sync::Arc, time::Duration};

use shoal_proto::{Asked, ImageSource, ObjectId, ObjectKind, Priority, Request};

use crate::{
    support::{Daemon, Registry, metric, tree, wait},
    wrong_bytes::{Liar, impostor},
};

/// Images, of one blob each.
const IMAGES: u64 = 24;
/// Images in memory beside those in use, and one more: it is looked what can go before the next one is loaded.
const REMEMBERED: f64 = 17.0;

fn known(daemon: &Daemon) -> f64 {
    metric(daemon, "shoal_known_blobs")
}

#[test]
fn images_that_nobody_uses_are_forgotten_and_found_again() {
    let mut registry = Registry::start();
    for n in 0..IMAGES {
        registry.publish(tree(700 + n, 1, 20_000).path(), &n.to_string());
    }
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &[]);
    for n in 0..IMAGES {
        daemon.ctl(&["prefetch", &registry.reference(&n.to_string())]);
        assert!(known(&daemon) > 0.0);
    }
    wait("most are forgotten", || known(&daemon) <= REMEMBERED);
    // The first ones have gone, and are there again when they are asked for.
    let pieces = daemon.status()["store"]["pieces"].as_u64().expect("a figure");
    daemon.ctl(&["evict", "--all"]);
    (0..IMAGES).for_each(|n| drop(daemon.ctl(&["prefetch", &registry.reference(&n.to_string())])));
    assert_eq!(daemon.status()["store"]["pieces"].as_u64(), Some(pieces));
    wait("most are forgotten again", || known(&daemon) <= REMEMBERED);
    daemon.stop();
}

#[test]
fn what_a_node_is_asked_for_as_a_home_that_it_is_not_leaves_nothing_behind() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (data, control, address) = runtime.block_on(impostor(Arc::new(Liar)));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &[format!("control.bootstrap_peers=[\"{address}\"]")]);
    daemon.wait_for_home();
    let to = data.connections()[0].peer;
    let asked = runtime.block_on(async {
        let mut answered = 0;
        for n in 0..64 {
            let request = Request {
                id: 0,
                image: ImageSource { registry: "127.0.0.1:1".into(), repository: "app".into() },
                what: Asked::Object { id: ObjectId::new([n; 32]), kind: ObjectKind::Blob },
                priority: Priority::OnDemand,
                source: true,
                deadline: Duration::from_secs(10),
                lacks: 0,
            };
            let mut answers = data.request(to, request, vec![1 << 20]).await.expect("it is connected");
            while let Some(Ok(_)) = futures::StreamExt::next(&mut answers).await {
                answered += 1;
            }
        }
        answered
    });
    assert_eq!(asked, 64, "each is answered in one word");
    wait("all are forgotten", || known(&daemon) == 0.0);
    daemon.stop();
    runtime.block_on(async {
        control.stop().await;
        data.stop().await;
    });
}

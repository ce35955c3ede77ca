//! Against an API server over TLS that can fail in many ways.

use std::{future::Future, path::Path};

use shoal_rafs::oci::{Authfile, Source};
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;

use self::api_double::ApiDouble;
use super::*;

mod api_double;

const TOKEN: &str = "correct-horse";
const QUICK: Pace =
    Pace { first: Duration::from_millis(5), longest: Duration::from_millis(50), settled: Duration::from_secs(10) };

struct Bed {
    api: ApiDouble,
    keyring: Keyring,
    folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { api: ApiDouble::start(TOKEN), keyring: Keyring::from(Authfile::default()), folder }
    }

    fn watch(&self, namespaces: &[&str]) -> AbortOnDropHandle<()> {
        let origin = Origin::File(self.api.kubeconfig(self.folder.path()));
        let namespaces: Vec<_> = namespaces.iter().map(ToString::to_string).collect();
        let keyring = self.keyring.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { watch(origin, &namespaces, keyring, QUICK).await }))
    }

    fn knows(&self, registry: &str) -> bool {
        self.keyring.knows(&Source::new(registry, "app").unwrap())
    }

    async fn learns(&self, registry: &str) {
        until(registry, || self.knows(registry)).await;
    }

    async fn forgets(&self, registry: &str) {
        until(registry, || !self.knows(registry)).await;
    }

    /// Lists and watches so far.
    fn asked(&self) -> (usize, usize) {
        let asked = self.api.asked();
        let watches = asked.iter().filter(|target| target.contains("watch=true")).count();
        (asked.len() - watches, watches)
    }

    /// Both watches are open.
    async fn settles(&self) {
        until("two watches", || self.asked().1 >= 2).await;
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    async move {
        while !holds() {
            assert!(Instant::now() < deadline, "never: {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn secrets_are_used_as_they_come_and_go() {
    let bed = Bed::new();
    // Three parts of a list.
    for n in 0..40 {
        bed.api.put(&format!("a/s{n}"), &format!("r{n}.io"), "u", "p");
    }
    bed.api.put_legacy("b/old", "legacy.io", "u", "p");
    let _watch = bed.watch(&[]);
    for registry in ["r0.io", "r39.io", "legacy.io"] {
        bed.learns(registry).await;
    }
    bed.api.put("b/new", "new.io", "u", "p");
    bed.learns("new.io").await;
    bed.api.put("b/new", "newer.io", "u", "p");
    bed.learns("newer.io").await;
    assert!(!bed.knows("new.io"), "it was changed");
    bed.api.remove("b/old");
    bed.forgets("legacy.io").await;
    assert!(bed.knows("r7.io"));
    // Others do not see what a registry's entry says, nor do other registries.
    assert!(!bed.knows("r7.io.evil.io"));
    let (lists, watches) = bed.asked();
    assert_eq!((lists, watches), (4, 2));
    assert!(bed.api.asked().iter().all(|target| target.starts_with("/api/v1/secrets?fieldSelector=type%3D")));
}

#[tokio::test]
async fn only_the_namespaces_that_are_named_count() {
    let bed = Bed::new();
    bed.api.put("a/s", "a.io", "u", "p");
    bed.api.put("b/s", "b.io", "u", "p");
    let _watch = bed.watch(&["a", "c"]);
    bed.learns("a.io").await;
    bed.api.put("b/t", "b.io", "u", "p");
    bed.api.put("c/s", "c.io", "u", "p");
    bed.learns("c.io").await;
    assert!(!bed.knows("b.io"));
    assert!(bed.api.asked().iter().all(|target| target.starts_with("/api/v1/namespaces/")));
}

#[tokio::test]
async fn a_watch_that_breaks_goes_on_where_it_was() {
    let bed = Bed::new();
    let _watch = bed.watch(&[]);
    bed.settles().await;
    bed.api.put("a/first", "first.io", "u", "p");
    bed.learns("first.io").await;
    let (lists, watches) = bed.asked();
    bed.api.cut();
    bed.api.put("a/second", "second.io", "u", "p");
    bed.api.remove("a/first");
    bed.learns("second.io").await;
    bed.forgets("first.io").await;
    assert_eq!(bed.asked().0, lists, "nothing was listed again");
    assert!(bed.asked().1 > watches);
    // Up to a bookmark nothing has happened, so one may go on from there although the server has forgotten what was before.
    bed.api.bookmark();
    bed.api.put("a/third", "third.io", "u", "p");
    bed.learns("third.io").await;
    let version = |target: &String| target.split("resourceVersion=").nth(1)?.split('&').next()?.parse::<u64>().ok();
    bed.api.cut();
    until("a watch from behind the bookmark", || bed.api.asked().iter().filter_map(version).any(|seen| seen > 9))
        .await;
}

#[tokio::test]
async fn what_the_server_has_forgotten_is_listed_again() {
    for expired_while_watching in [false, true] {
        let bed = Bed::new();
        bed.api.put("a/gone", "gone.io", "u", "p");
        bed.api.put("a/stays", "stays.io", "u", "p");
        let _watch = bed.watch(&[]);
        bed.learns("gone.io").await;
        bed.settles().await;
        let (lists, _) = bed.asked();
        if expired_while_watching {
            bed.api.expire();
        } else {
            bed.api.cut();
        }
        // Nobody who watches is told of this.
        bed.api.remove("a/gone");
        bed.api.forget();
        bed.forgets("gone.io").await;
        assert!(bed.knows("stays.io") && bed.asked().0 >= lists);
        bed.api.put("a/new", "new.io", "u", "p");
        bed.learns("new.io").await;
    }
}

#[tokio::test]
async fn a_token_is_read_again_and_what_is_known_stays_meanwhile() {
    let bed = Bed::new();
    bed.api.put("a/s", "a.io", "u", "p");
    let _watch = bed.watch(&[]);
    bed.learns("a.io").await;
    bed.settles().await;
    bed.api.rotate("another");
    bed.api.cut();
    let asked = bed.api.asked().len();
    until("it is refused", || bed.api.asked().len() > asked + 3).await;
    assert!(bed.knows("a.io"));
    bed.api.put("a/t", "b.io", "u", "p");
    bed.api.write_token(bed.folder.path());
    bed.learns("b.io").await;
}

#[tokio::test]
async fn nobody_else_is_shown_the_token() {
    let bed = Bed::new();
    // Somebody else at that address: this is not who the kubeconfig means.
    let path = bed.api.kubeconfig(bed.folder.path());
    let other = Bed::new();
    std::fs::copy(path.with_file_name("ca.crt"), other.folder.path().join("mixed")).unwrap();
    let config = other.api.kubeconfig(other.folder.path());
    std::fs::rename(other.folder.path().join("mixed"), other.folder.path().join("ca.crt")).unwrap();
    let trusting = |path: &Path, keyring: &Keyring| {
        let (origin, keyring) = (Origin::File(path.to_owned()), keyring.clone());
        AbortOnDropHandle::new(tokio::spawn(async move { watch(origin, &[], keyring, QUICK).await }))
    };
    other.api.put("a/s", "a.io", "u", "p");
    let _untrusted = trusting(&config, &other.keyring);
    // And one that sends us elsewhere.
    bed.api.redirect();
    let _sent = trusting(&path, &bed.keyring);
    until("it is sent elsewhere", || bed.api.asked().len() > 4).await;
    assert!(bed.api.asked().iter().all(|target| !target.starts_with("/elsewhere")));
    assert!(other.api.asked().is_empty() && !other.knows("a.io"));
}

#[tokio::test]
async fn a_kubeconfig_may_come_later() {
    let bed = Bed::new();
    bed.api.put("a/s", "a.io", "u", "p");
    let (origin, keyring) = (Origin::File(bed.folder.path().join("kubeconfig")), bed.keyring.clone());
    let _watch = AbortOnDropHandle::new(tokio::spawn(async move { watch(origin, &[], keyring, QUICK).await }));
    sleep(Duration::from_millis(20)).await;
    bed.api.kubeconfig(bed.folder.path());
    bed.learns("a.io").await;
}

//! Arbitrary operations on the catalog and on a plain list of snapshots that knows the rules in the words of containerd's
//! documentation: both say the same, and what was written down on the way restores the same catalog.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use shoal_snapshots::{
    Backing, Catalog, CatalogError, Filter, Kind, LabelUpdate, Labels, Lower, Snapshot, SnapshotId, Usage,
};

#[derive(Debug, Clone)]
enum Op {
    Create { view: bool, name: u8, parent: Option<u8> },
    Commit { name: u8, key: u8, backing: Backing },
    Label { name: u8, only: bool, value: u8 },
    Remove { name: u8 },
    Restart,
}

fn name(n: u8) -> String {
    format!("ns/{}", n % 12)
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let backing = prop_oneof![4 => Just(Backing::Directory), 1 => Just(Backing::Nothing), 2 => Just(Backing::Lazy { image: "a".into() })];
    let op = prop_oneof![
        4 => (any::<bool>(), 0u8..12, proptest::option::of(0u8..12))
            .prop_map(|(view, name, parent)| Op::Create { view, name, parent }),
        4 => (0u8..12, 0u8..12, backing).prop_map(|(name, key, backing)| Op::Commit { name, key, backing }),
        1 => (0u8..12, any::<bool>(), any::<u8>()).prop_map(|(name, only, value)| Op::Label { name, only, value }),
        3 => (0u8..12).prop_map(|name| Op::Remove { name }),
        1 => Just(Op::Restart),
    ];
    proptest::collection::vec(op, 0..120)
}

/// What a snapshot is in the model: no numbers, found by looking through the list.
#[derive(Debug, Clone, PartialEq)]
struct Plain {
    name: String,
    parent: String,
    kind: Kind,
    backing: Backing,
    labels: Labels,
    id: SnapshotId,
}

#[derive(Default)]
struct Model(Vec<Plain>);

impl Model {
    fn find(&self, name: &str) -> Option<&Plain> {
        self.0.iter().find(|plain| plain.name == name)
    }

    fn create_fails(&self, name: &str, parent: &str) -> Option<CatalogError> {
        if !parent.is_empty() {
            match self.find(parent) {
                None => return Some(CatalogError::NoParent { name: name.into(), parent: parent.into() }),
                Some(plain) if plain.kind != Kind::Committed => {
                    return Some(CatalogError::ParentNotCommitted { parent: parent.into() });
                }
                Some(_) => {}
            }
        }
        self.find(name).map(|_| CatalogError::Exists(name.into()))
    }

    fn commit_fails(&self, name: &str, key: &str) -> Option<CatalogError> {
        if self.find(name).is_some() {
            return Some(CatalogError::Exists(name.into()));
        }
        match self.find(key) {
            None => Some(CatalogError::NotFound(key.into())),
            Some(plain) if plain.kind != Kind::Active => Some(CatalogError::NotActive(key.into())),
            Some(_) => None,
        }
    }

    fn remove_fails(&self, name: &str) -> Option<CatalogError> {
        if self.find(name).is_none() {
            return Some(CatalogError::NotFound(name.into()));
        }
        let has_child = self.0.iter().any(|plain| plain.parent == name);
        has_child.then(|| CatalogError::HasChildren(name.into()))
    }

    /// Ancestors down to the first lazy one; a blob layer in between cannot be looked at.
    fn lowers(&self, name: &str) -> Result<Vec<Lower>, CatalogError> {
        if name.is_empty() {
            return Ok(Vec::new());
        }
        let plain = self.find(name).expect("parents are there");
        let own = |image| vec![Lower { id: plain.id, image }];
        match &plain.backing {
            Backing::Lazy { image } => Ok(own(Some(image.clone()))),
            Backing::Nothing => Err(CatalogError::NoFiles(name.into())),
            Backing::Directory => Ok([own(None), self.lowers(&plain.parent)?].concat()),
        }
    }
}

fn plain(snapshot: &Snapshot) -> Plain {
    let Snapshot { id, name, parent, kind, backing, labels, .. } = snapshot.clone();
    Plain { name, parent, kind, backing, labels, id }
}

fn at(second: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(second)
}

fn label(value: u8) -> Labels {
    Labels::from([("a".into(), value.to_string()), ("b".into(), "x".into())])
}

/// Applies one operation to both; the catalog's answer must be the model's.
fn apply(catalog: &mut Catalog, model: &mut Model, op: Op, now: SystemTime) {
    match op {
        Op::Create { view, name: n, parent } => {
            let (name, parent) = (name(n), parent.map(name).unwrap_or_default());
            let made = match view {
                true => catalog.view(&name, &parent, label(n), now),
                false => catalog.prepare(&name, &parent, label(n), now),
            };
            assert_eq!(made.as_ref().err(), model.create_fails(&name, &parent).as_ref());
            if let Ok(snapshot) = made {
                assert_eq!(snapshot.kind, if view { Kind::View } else { Kind::Active });
                assert!(model.0.iter().all(|other| other.id < snapshot.id), "numbers only grow");
                model.0.push(plain(&snapshot));
                catalog.put(snapshot);
            }
        }
        Op::Commit { name: n, key, backing } => {
            let (name, key) = (name(n), name(key));
            let made = catalog.commit(&name, &key, label(n), Usage { inodes: 1, bytes: 2 }, now);
            assert_eq!(made.as_ref().err(), model.commit_fails(&name, &key).as_ref());
            if let Ok(snapshot) = made {
                let snapshot = Snapshot { backing, ..snapshot };
                assert_eq!((snapshot.kind, snapshot.created), (Kind::Committed, now));
                let place = model.0.iter_mut().find(|plain| plain.name == key).expect("it was active");
                assert_eq!(place.id, snapshot.id, "the directory stays");
                *place = plain(&snapshot);
                catalog.put(snapshot);
            }
        }
        Op::Label { name: n, only, value } => {
            let name = name(n);
            let update = if only { LabelUpdate::Keys(vec!["a".into()]) } else { LabelUpdate::All };
            let made = catalog.update(&name, &update, Labels::from([("a".into(), value.to_string())]), now);
            assert_eq!(made.is_ok(), model.find(&name).is_some());
            if let Ok(snapshot) = made {
                let place = model.0.iter_mut().find(|plain| plain.name == name).expect("it is there");
                if !only {
                    place.labels.clear();
                }
                place.labels.insert("a".into(), value.to_string());
                catalog.put(snapshot);
            }
        }
        Op::Remove { name: n } => {
            let name = name(n);
            let gone = catalog.remove(&name).map(|snapshot| snapshot.id);
            assert_eq!(gone.as_ref().err(), model.remove_fails(&name).as_ref());
            if let Ok(id) = gone {
                model.0.retain(|plain| plain.id != id);
                catalog.forget(id);
            }
        }
        Op::Restart => {
            // What was written down is what the files of the daemon hold.
            let mut records: Vec<_> = all(catalog).into_iter().map(|s| serde_json::to_string(&s).unwrap()).collect();
            records.reverse();
            let records = records.iter().map(|record| serde_json::from_str(record).unwrap());
            let (restored, left_out) = Catalog::restore(records);
            assert_eq!(left_out, []);
            *catalog = restored;
        }
    }
}

fn all(catalog: &Catalog) -> Vec<Snapshot> {
    catalog.list(&Filter::parse::<&str>(&[]).unwrap()).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_catalog_and_the_model_agree(ops in ops()) {
        let (mut catalog, mut model) = (Catalog::default(), Model::default());
        for (second, op) in ops.into_iter().enumerate() {
            apply(&mut catalog, &mut model, op, at(second as u64));
            let mut expected = model.0.clone();
            expected.sort_by(|a, b| a.name.cmp(&b.name));
            let found: Vec<_> = all(&catalog).iter().map(plain).collect();
            prop_assert_eq!(&found, &expected);
            for plain in &model.0 {
                prop_assert_eq!(catalog.by_id(plain.id).map(|s| &s.name), Some(&plain.name));
                let mounted = catalog.mounted(&plain.name).map(|(_, lowers)| lowers);
                match plain.kind {
                    Kind::Committed => prop_assert_eq!(mounted, Err(CatalogError::NoMounts(plain.name.clone()))),
                    _ => prop_assert_eq!(mounted, model.lowers(&plain.parent)),
                }
            }
        }
    }

    #[test]
    fn a_quoted_value_is_found_again(key in "\\PC{1,12}", value in "\\PC{0,12}", other in "\\PC{0,12}") {
        let quoted = |text: &str| {
            let escaped: String = text.chars().map(|c| format!("\\U{:08x}", c as u32)).collect();
            format!("\"{escaped}\"")
        };
        let mut catalog = Catalog::default();
        let made = catalog.prepare("s", "", Labels::from([(key.clone(), value.clone())]), at(0)).unwrap();
        catalog.put(made);
        let found = |filter: String| catalog.list(&Filter::parse(&[filter]).unwrap()).count();
        prop_assert_eq!(found(format!("labels.{}=={}", quoted(&key), quoted(&value))), 1);
        prop_assert_eq!(found(format!("labels.{}=={},kind==active", quoted(&key), quoted(&other))), usize::from(value == other));
    }

    #[test]
    fn no_filter_makes_it_panic(filter in "[a-z.,=!~\"/|\\\\x0-7uU \u{e4}-]{0,40}") {
        if let Ok(filter) = Filter::parse(&[filter]) {
            filter.matches(|_| Some("x"));
        }
    }
}

#[test]
fn a_record_that_contradicts_others_is_left_out_with_what_descends_from_it() {
    let mut catalog = Catalog::default();
    let parent = catalog.prepare("key", "", Labels::new(), at(1)).unwrap();
    catalog.put(parent);
    let parent = catalog.commit("parent", "key", Labels::new(), Usage::default(), at(2)).unwrap();
    catalog.put(parent.clone());
    let child = catalog.view("child", "parent", Labels::new(), at(3)).unwrap();
    catalog.put(child.clone());
    let other = catalog.prepare("other", "", Labels::new(), at(4)).unwrap();
    // The others are there, and no number is used again.
    let left_out = |records: [Snapshot; 2]| {
        let (mut restored, left_out) = Catalog::restore(records.into_iter().chain([other.clone()]));
        assert_eq!(restored.get("other").map(|found| found.id), Ok(other.id));
        assert_eq!(all(&restored).len() + left_out.len(), 3);
        assert!(restored.prepare("new", "", Labels::new(), at(5)).unwrap().id > other.id);
        left_out.into_iter().map(|one| (one.name, one.what)).collect::<Vec<_>>()
    };
    assert_eq!(left_out([child.clone(), parent.clone()]), []);
    let one = |name: &str, what| vec![(name.to_owned(), what)];
    let missing = "its parent is missing, or younger";
    let same_number = Snapshot { id: parent.id, ..child.clone() };
    assert_eq!(left_out([parent.clone(), same_number]), one("child", "the number is used twice"));
    let same_name = Snapshot { name: "parent".into(), ..child.clone() };
    assert_eq!(left_out([parent.clone(), same_name]), one("parent", "the name is used twice"));
    let orphan = Snapshot { parent: "x".into(), ..child.clone() };
    assert_eq!(left_out([parent.clone(), orphan]), one("child", missing));
    let active = Snapshot { kind: Kind::Active, ..parent.clone() };
    assert_eq!(left_out([active, child.clone()]), one("child", "its parent is not committed"));
    let circle = Snapshot { parent: "child".into(), ..parent };
    assert_eq!(left_out([circle, child]), [("parent".to_owned(), missing), ("child".to_owned(), missing)]);
}

/// Who changes what is written down raises [`Snapshot::VERSION`], so that no other version is upgraded to that would not read it.
#[test]
fn a_record_is_what_its_version_says() {
    let snapshot = Snapshot {
        id: SnapshotId(7),
        name: "n".into(),
        parent: "p".into(),
        kind: Kind::View,
        backing: Backing::Lazy { image: "i".into() },
        labels: Labels::from([("k".into(), "v".into())]),
        created: at(1),
        updated: at(2),
        usage: Usage { inodes: 3, bytes: 4 },
    };
    let time = |seconds| serde_json::json!({ "secs_since_epoch": seconds, "nanos_since_epoch": 0 });
    let record = serde_json::json!({
        "id": 7, "name": "n", "parent": "p", "kind": "view", "backing": { "lazy": { "image": "i" } },
        "labels": { "k": "v" }, "created": time(1), "updated": time(2), "usage": { "inodes": 3, "bytes": 4 },
    });
    assert_eq!((serde_json::to_value(&snapshot).unwrap(), Snapshot::VERSION), (record.clone(), 1));
    for (backing, written) in [(Backing::Directory, "directory"), (Backing::Nothing, "nothing")] {
        assert_eq!(serde_json::to_value(backing).unwrap(), written);
    }
    let mut newer = record;
    newer["since_version_2"] = true.into();
    serde_json::from_value::<Snapshot>(newer).unwrap_err();
}

#[test]
fn names_and_labels_are_bounded() {
    let mut catalog = Catalog::default();
    let long = "n".repeat(Snapshot::MAX_NAME + 1);
    assert_eq!(catalog.prepare("", "", Labels::new(), at(0)), Err(CatalogError::Name(0)));
    assert_eq!(catalog.view(&long, "", Labels::new(), at(0)), Err(CatalogError::Name(long.len())));
    let labels = Labels::from([("l".into(), "v".repeat(Snapshot::MAX_LABELS))]);
    assert_eq!(catalog.prepare("n", "", labels.clone(), at(0)), Err(CatalogError::Labels("n".into())));
    let made = catalog.prepare("n", "", Labels::new(), at(0)).unwrap();
    catalog.put(made);
    assert_eq!(catalog.update("n", &LabelUpdate::All, labels, at(0)), Err(CatalogError::Labels("n".into())));
    let paths = ["labels.a".to_owned(), "kind".to_owned()];
    let immutable = CatalogError::Immutable { name: "n".into(), field: "kind".into() };
    assert_eq!(LabelUpdate::parse("n", &paths), Err(immutable));
    assert_eq!(LabelUpdate::parse("n", &paths[..1]), Ok(LabelUpdate::Keys(vec!["a".into()])));
    assert_eq!(LabelUpdate::parse("n", &[]), Ok(LabelUpdate::All));
}

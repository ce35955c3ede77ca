//! All snapshots of a node, and the rules by which they come and go.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use crate::{Backing, Filter, Kind, Labels, Snapshot, SnapshotId, Usage};

/// Why something cannot be done to a snapshot. The comments name the gRPC code that containerd expects for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// Already exists.
    #[error("snapshot {0:?} exists already")]
    Exists(String),
    /// Not found.
    #[error("there is no snapshot {0:?}")]
    NotFound(String),
    /// Not found.
    #[error("there is no snapshot {parent:?} for {name:?} to descend from")]
    NoParent {
        /// The snapshot that was to be made.
        name: String,
        /// Its parent.
        parent: String,
    },
    /// Invalid argument.
    #[error("snapshot {parent:?} is not committed, nothing can descend from it")]
    ParentNotCommitted {
        /// The parent.
        parent: String,
    },
    /// Failed precondition.
    #[error("snapshot {0:?} is not active")]
    NotActive(String),
    /// Failed precondition.
    #[error("snapshot {0:?} is committed and has no mounts")]
    NoMounts(String),
    /// Failed precondition.
    #[error("snapshot {0:?} has descendants")]
    HasChildren(String),
    /// Failed precondition: only the bootstrap layer of a lazy image can stand on its blob layers.
    #[error("snapshot {0:?} is a data blob layer, which has no files of its own to descend from")]
    NoFiles(String),
    /// Invalid argument.
    #[error("{field:?} of snapshot {name:?} cannot be changed")]
    Immutable {
        /// The snapshot.
        name: String,
        /// The field.
        field: String,
    },
    /// Invalid argument.
    #[error("a snapshot's name has 1 to {max} bytes, not {0}", max = Snapshot::MAX_NAME)]
    Name(usize),
    /// Invalid argument.
    #[error("labels of snapshot {0:?} have more than {max} bytes", max = Snapshot::MAX_LABELS)]
    Labels(String),
}

/// Records of snapshots that cannot all be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {id} of snapshot {name:?}: {what}")]
pub struct Inconsistent {
    /// Number of the snapshot.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub what: &'static str,
}

/// Which labels an update replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelUpdate {
    /// All of them.
    All,
    /// These: set to the new value, or taken away where there is none.
    Keys(Vec<String>),
}

impl LabelUpdate {
    /// From the paths of a field mask: none, `labels`, or `labels.KEY`.
    pub fn parse(name: &str, paths: &[String]) -> Result<Self, CatalogError> {
        let mut keys = Vec::new();
        for path in paths {
            match path.strip_prefix("labels.") {
                Some(key) => keys.push(key.to_owned()),
                None if path == "labels" => return Ok(Self::All),
                None => return Err(CatalogError::Immutable { name: name.to_owned(), field: path.clone() }),
            }
        }
        Ok(if keys.is_empty() { Self::All } else { Self::Keys(keys) })
    }
}

/// A tree that a snapshot's mounts are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lower {
    /// The snapshot that has it.
    pub id: SnapshotId,
    /// The image that is mounted there, if it is one.
    pub image: Option<String>,
}

/// The snapshots.
#[derive(Debug, Default)]
pub struct Catalog {
    by_name: BTreeMap<String, Snapshot>,
    names: HashMap<SnapshotId, String>,
    /// How many descend directly from a snapshot; those without are left out.
    children: HashMap<String, usize>,
    last_id: u64,
}

impl Catalog {
    /// From what was written down, in any order. What contradicts the rest is left out and told, and so is what descends from
    /// it: one bad record must not take the others along.
    pub fn restore(records: impl IntoIterator<Item = Snapshot>) -> (Self, Vec<Inconsistent>) {
        let (mut catalog, mut left_out) = (Self::default(), Vec::new());
        let mut records: Vec<_> = records.into_iter().collect();
        // Parents first: they are older. So there are no circles.
        records.sort_by_key(|snapshot| snapshot.id);
        for snapshot in records {
            catalog.reserve(snapshot.id);
            match catalog.contradiction(&snapshot) {
                None => catalog.put(snapshot),
                Some(what) => left_out.push(Inconsistent { id: snapshot.id, name: snapshot.name, what }),
            }
        }
        (catalog, left_out)
    }

    /// Why a record cannot stand beside those of older snapshots.
    fn contradiction(&self, snapshot: &Snapshot) -> Option<&'static str> {
        if self.names.contains_key(&snapshot.id) {
            return Some("the number is used twice");
        }
        if self.by_name.contains_key(&snapshot.name) {
            return Some("the name is used twice");
        }
        match self.by_name.get(&snapshot.parent) {
            None if !snapshot.parent.is_empty() => Some("its parent is missing, or younger"),
            Some(parent) if parent.kind != Kind::Committed => Some("its parent is not committed"),
            _ => None,
        }
    }

    /// Gives this number to no new snapshot: something has it that is none.
    pub fn reserve(&mut self, id: SnapshotId) {
        self.last_id = self.last_id.max(id.0);
    }

    /// A new active snapshot over `parent` (empty: over nothing).
    pub fn prepare(
        &mut self,
        name: &str,
        parent: &str,
        labels: Labels,
        now: SystemTime,
    ) -> Result<Snapshot, CatalogError> {
        self.create(Kind::Active, name, parent, labels, now)
    }

    /// A new view of `parent` (empty: of nothing).
    pub fn view(
        &mut self,
        name: &str,
        parent: &str,
        labels: Labels,
        now: SystemTime,
    ) -> Result<Snapshot, CatalogError> {
        self.create(Kind::View, name, parent, labels, now)
    }

    fn create(
        &mut self,
        kind: Kind,
        name: &str,
        parent: &str,
        labels: Labels,
        now: SystemTime,
    ) -> Result<Snapshot, CatalogError> {
        check_name(name)?;
        check_labels(name, &labels)?;
        match self.by_name.get(parent) {
            None if parent.is_empty() => {}
            None => return Err(CatalogError::NoParent { name: name.into(), parent: parent.into() }),
            Some(snapshot) if snapshot.kind != Kind::Committed => {
                return Err(CatalogError::ParentNotCommitted { parent: parent.into() });
            }
            Some(_) => {}
        }
        if self.by_name.contains_key(name) {
            return Err(CatalogError::Exists(name.into()));
        }
        // Used up even if the snapshot comes to nothing: something of it may have stayed behind.
        self.last_id += 1;
        Ok(Snapshot {
            id: SnapshotId(self.last_id),
            name: name.into(),
            parent: parent.into(),
            kind,
            backing: Backing::Directory,
            labels,
            created: now,
            updated: now,
            usage: Usage::default(),
        })
    }

    /// The active snapshot `key` as it will be when it is committed as `name`. Its labels are replaced.
    pub fn commit(
        &self,
        name: &str,
        key: &str,
        labels: Labels,
        usage: Usage,
        now: SystemTime,
    ) -> Result<Snapshot, CatalogError> {
        check_name(name)?;
        check_labels(name, &labels)?;
        if self.by_name.contains_key(name) {
            return Err(CatalogError::Exists(name.into()));
        }
        let active = self.get(key)?;
        if active.kind != Kind::Active {
            return Err(CatalogError::NotActive(key.into()));
        }
        let kind = Kind::Committed;
        Ok(Snapshot { name: name.into(), kind, labels, usage, created: now, updated: now, ..active.clone() })
    }

    /// A snapshot as it will be with these labels.
    pub fn update(
        &self,
        name: &str,
        update: &LabelUpdate,
        mut labels: Labels,
        now: SystemTime,
    ) -> Result<Snapshot, CatalogError> {
        let mut snapshot = self.get(name)?.clone();
        match update {
            LabelUpdate::All => snapshot.labels = labels,
            LabelUpdate::Keys(keys) => {
                for key in keys {
                    match labels.remove(key) {
                        Some(value) => drop(snapshot.labels.insert(key.clone(), value)),
                        None => drop(snapshot.labels.remove(key)),
                    }
                }
            }
        }
        check_labels(name, &snapshot.labels)?;
        Ok(Snapshot { updated: now, ..snapshot })
    }

    /// The snapshot that is to go, if it may.
    pub fn remove(&self, name: &str) -> Result<&Snapshot, CatalogError> {
        let snapshot = self.get(name)?;
        match self.children.get(name) {
            Some(_) => Err(CatalogError::HasChildren(name.into())),
            None => Ok(snapshot),
        }
    }

    /// Remembers a snapshot, in place of an earlier state of it.
    pub fn put(&mut self, snapshot: Snapshot) {
        self.forget(snapshot.id);
        self.reserve(snapshot.id);
        self.names.insert(snapshot.id, snapshot.name.clone());
        if !snapshot.parent.is_empty() {
            *self.children.entry(snapshot.parent.clone()).or_default() += 1;
        }
        self.by_name.insert(snapshot.name.clone(), snapshot);
    }

    /// Forgets a snapshot, if there is one with this number.
    pub fn forget(&mut self, id: SnapshotId) {
        let Some(gone) = self.names.remove(&id).and_then(|name| self.by_name.remove(&name)) else { return };
        if let Some(count) = self.children.get_mut(&gone.parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&gone.parent);
            }
        }
    }

    /// The snapshot with this name or key.
    pub fn get(&self, name: &str) -> Result<&Snapshot, CatalogError> {
        self.by_name.get(name).ok_or_else(|| CatalogError::NotFound(name.into()))
    }

    /// The snapshot with this number.
    pub fn by_id(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.by_name.get(self.names.get(&id)?)
    }

    /// The snapshots that pass a filter, by name.
    pub fn list<'a>(&'a self, filter: &'a Filter) -> impl Iterator<Item = &'a Snapshot> {
        self.by_name.values().filter(|snapshot| filter.matches(|path| snapshot.field(path)))
    }

    /// The active snapshot or view with this key, and the trees below it, the uppermost first. A lazy image holds
    /// everything below it, so it is the last.
    pub fn mounted(&self, key: &str) -> Result<(&Snapshot, Vec<Lower>), CatalogError> {
        let snapshot = self.get(key)?;
        if snapshot.kind == Kind::Committed {
            return Err(CatalogError::NoMounts(key.into()));
        }
        Ok((snapshot, self.lowers(&snapshot.parent)?))
    }

    /// The trees of `name` and of what it descends from, the uppermost first; none for an empty name.
    pub fn lowers<'a>(&'a self, mut name: &'a str) -> Result<Vec<Lower>, CatalogError> {
        let mut lowers = Vec::new();
        while !name.is_empty() {
            let snapshot = self.get(name)?;
            let image = match &snapshot.backing {
                Backing::Directory => None,
                Backing::Lazy { image } => Some(image.clone()),
                Backing::Nothing => return Err(CatalogError::NoFiles(name.into())),
            };
            name = if image.is_some() { "" } else { &snapshot.parent };
            lowers.push(Lower { id: snapshot.id, image });
        }
        Ok(lowers)
    }
}

fn check_name(name: &str) -> Result<(), CatalogError> {
    if (1..=Snapshot::MAX_NAME).contains(&name.len()) { Ok(()) } else { Err(CatalogError::Name(name.len())) }
}

fn check_labels(name: &str, labels: &Labels) -> Result<(), CatalogError> {
    let bytes: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes <= Snapshot::MAX_LABELS { Ok(()) } else { Err(CatalogError::Labels(name.into())) }
}

//! One snapshot, as it is remembered and as it is written down.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use serde::{Deserialize, Serialize};

/// What whoever made a snapshot says about it.
pub type Labels = BTreeMap<String, String>;

/// The number of a snapshot, which names its directory. Never used twice, and larger than its parent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It can be mounted and read.
    View,
    /// It can be mounted, written and committed.
    Active,
    /// Others can descend from it.
    Committed,
}

impl Kind {
    /// The word that filters use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Where the files of a snapshot itself are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// In its directory.
    Directory,
    /// It has none: a data blob layer of a lazy image, which is read through the bootstrap layer above it.
    Nothing,
    /// In an image that is mounted lazily in its directory, and that holds everything below it, too.
    Lazy {
        /// How the image is called, with its digest.
        image: String,
    },
}

/// Disk that a snapshot takes by itself, without its ancestors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Files, directories and everything else that has an inode, each once.
    pub inodes: u64,
    /// Allocated bytes.
    pub bytes: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its number.
    pub id: SnapshotId,
    /// Its key, once committed its name. At most [`MAX_NAME`](Self::MAX_NAME) bytes.
    pub name: String,
    /// The name of the snapshot that it descends from; empty if there is none.
    pub parent: String,
    /// What may be done with it.
    pub kind: Kind,
    /// Where its files are.
    pub backing: Backing,
    /// What its owner says about it.
    pub labels: Labels,
    /// When it was made, or committed.
    pub created: SystemTime,
    /// When its labels last changed.
    pub updated: SystemTime,
    /// Disk that it takes; known once it is committed.
    pub usage: Usage,
}

impl Snapshot {
    /// Version of what is written down of a snapshot. Raised with each field and each value that earlier versions do not know.
    pub const VERSION: u32 = 1;
    /// Longest name in bytes. containerd's are about 100.
    pub const MAX_NAME: usize = 4096;
    /// Most bytes of all labels. containerd allows 4096 for one label.
    pub const MAX_LABELS: usize = 256 << 10;

    /// The value that a filter's field path leads to, if the snapshot has it: `name`, `parent`, `kind` or `labels.KEY`,
    /// where dots in the key may be written as further fields.
    pub fn field<'a>(&'a self, path: &[String]) -> Option<&'a str> {
        match path.split_first()? {
            (first, []) => match first.as_str() {
                "name" => Some(&self.name),
                "parent" => Some(&self.parent),
                "kind" => Some(self.kind.as_str()),
                _ => None,
            },
            (first, key) if first == "labels" => self.labels.get(&key.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

//! What containerd's snapshots are and what may be done to them, without a file, a mount or a socket.
//!
//! ```text
//!              prepare                     commit                      prepare, view
//!   parent ───────────────> active "key" ──────────> committed "name" ───────────────> active / view "container"
//!  (committed, or none)         │ remove                  │ remove, once nobody descends from it
//! ```
//!
//! A snapshot is a tree of files made of its own changes over those of its parent. An **active** one can be written
//! through the mounts that its owner gets, and be committed; a **view** can only be read; a **committed** one has no
//! mounts, never changes, and is what others descend from. Names are opaque: containerd prefixes them with its
//! namespace and a number.
//!
//! Below a lazy image not every snapshot has files of its own, hence [`Backing`]: data blob layers have none, and the
//! bootstrap layer on top of them is a mount of the whole image. [`Catalog::lowers`] is where that is put together.
//!
//! The catalog decides and remembers; it does not keep. Whoever owns it writes down what it decided (a snapshot that was
//! [created](Catalog::prepare) or [committed](Catalog::commit), or one that is to [go](Catalog::remove)), and then
//! tells it with [`Catalog::put`] or [`Catalog::forget`]. A decision that could not be written down changes nothing.
//!
//! Rules and error kinds are those of containerd's own snapshotters (its `core/snapshots/storage` and `pkg/filters`).

mod catalog;
mod filter;
mod snapshot;

pub use catalog::{Catalog, CatalogError, Inconsistent, LabelUpdate, Lower};
pub use filter::{Filter, FilterError, MAX_FILTER_BYTES, MAX_SELECTORS};
pub use snapshot::{Backing, Kind, Labels, Snapshot, SnapshotId, Usage};

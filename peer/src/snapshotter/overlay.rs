//! The mounts that a snapshot's owner is to make: overlayfs over the trees below it, as containerd's own overlayfs
//! snapshotter has it, so that its diff service unpacks and compares layers as usual.

use std::path::{Path, PathBuf};

use shoal_snapshots::{Kind, Lower, Snapshot};

use super::directories::Directories;
use crate::containerd::types::Mount;

/// The mounts of an active snapshot or a view, over `lowers`, the uppermost first, of which each lies at one of `trees`.
pub(super) fn mounts(
    directories: &Directories,
    snapshot: &Snapshot,
    lowers: &[Lower],
    mut trees: Vec<PathBuf>,
    index_off: bool,
) -> Vec<Mount> {
    let own = directories.fs(snapshot.id);
    let writable = snapshot.kind == Kind::Active;
    let mut options: Vec<String> = if index_off { vec!["index=off".into()] } else { Vec::new() };
    match lowers {
        [] => return vec![bind(&own, writable)],
        [only] if !writable && only.image.is_none() => return vec![bind(&trees[0], false)],
        // A lazy mount is nosuid and nodev, which a bind mount would inherit; an overlay of two trees does not.
        [_] if !writable => trees.insert(0, own.clone()),
        _ => {}
    }
    if writable {
        options.push(format!("workdir={}", directories.work(snapshot.id).display()));
        options.push(format!("upperdir={}", own.display()));
    }
    let trees: Vec<_> = trees.iter().map(|tree| tree.display().to_string()).collect();
    options.push(format!("lowerdir={}", trees.join(":")));
    vec![Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
}

fn bind(tree: &Path, writable: bool) -> Mount {
    let options = vec![if writable { "rw" } else { "ro" }.to_owned(), "rbind".to_owned()];
    Mount { r#type: "bind".into(), source: tree.display().to_string(), target: String::new(), options }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use shoal_snapshots::{Backing, Labels, SnapshotId, Usage};

    use super::*;

    fn made(kind: Kind, lowers: &[Lower]) -> Mount {
        let snapshot = Snapshot {
            id: SnapshotId(9),
            name: "key".into(),
            parent: String::new(),
            kind,
            backing: Backing::Directory,
            labels: Labels::new(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage::default(),
        };
        let directories = Directories::new("/s".into());
        let trees = lowers.iter().map(|lower| directories.fs(lower.id)).collect();
        let mut mounts = mounts(&directories, &snapshot, lowers, trees, true);
        assert_eq!(mounts.len(), 1);
        mounts.remove(0)
    }

    #[test]
    fn as_many_trees_as_there_are() {
        let lower = |id, lazy: bool| Lower { id: SnapshotId(id), image: lazy.then(|| "a".into()) };
        let two = [lower(2, false), lower(1, true)];
        for (kind, lowers, kind_of, source, options) in [
            (Kind::Active, &[][..], "bind", "/s/9/fs", "rw,rbind"),
            (Kind::View, &[], "bind", "/s/9/fs", "ro,rbind"),
            (Kind::View, &two[..1], "bind", "/s/2/fs", "ro,rbind"),
            (Kind::View, &two[1..], "overlay", "overlay", "index=off,lowerdir=/s/9/fs:/s/1/fs"),
            (Kind::View, &two, "overlay", "overlay", "index=off,lowerdir=/s/2/fs:/s/1/fs"),
            (
                Kind::Active,
                &two,
                "overlay",
                "overlay",
                "index=off,workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/2/fs:/s/1/fs",
            ),
        ] {
            let mount = made(kind, lowers);
            let found = (mount.r#type.as_str(), mount.source.as_str(), mount.options.join(","));
            assert_eq!(found, (kind_of, source, options.to_owned()), "{kind:?} {lowers:?}");
        }
    }
}

//! What a layer leaves to those below it.

use std::collections::{BTreeSet, HashSet};

use super::tree::{Draft, Inode};
use crate::bootstrap::{Bootstrap, BootstrapError, Kind, Nid};

/// What the archive of a layer says of files that are not in it, for which its bootstrap has no place. Without them such
/// a directory replaces the attributes of the one below, and such a link is an error.
///
/// Paths have no slash in front; that of the root is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerNotes {
    /// Directories that hold entries of the layer and are not described by it: they are what they are below.
    pub implied: BTreeSet<Vec<u8>>,
    /// Hard links to files of lower layers, in the order of the archive.
    pub links: Vec<ForeignLink>,
}

/// A hard link whose target another layer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignLink {
    /// Where the link is.
    pub path: Vec<u8>,
    /// The file that it is a name of.
    pub target: Vec<u8>,
}

impl LayerNotes {
    /// The implied directories in the layer's bootstrap.
    pub(super) fn implied_in(&self, layer: &Bootstrap) -> Result<HashSet<Nid>, BootstrapError> {
        let mut found = HashSet::new();
        for path in &self.implied {
            let mut nid = Some(layer.root());
            for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
                let Some(directory) = nid else { break };
                let directory = layer.inode(directory)?;
                nid = if directory.kind() == Kind::Directory { directory.lookup(name)? } else { None };
            }
            found.extend(nid);
        }
        Ok(found)
    }
}

impl ForeignLink {
    /// Gives the file of a lower layer another name.
    pub(super) fn put(&self, draft: &mut Draft) -> Result<(), String> {
        let Self { path, target } = self;
        let show = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
        let mut names = target.split(|byte| *byte == b'/');
        let found = names.try_fold(Draft::ROOT, |entry, name| draft.child(entry, name));
        let found = found.filter(|entry| !draft.is_directory(*entry));
        let found = found
            .ok_or_else(|| format!("{:?} is a hard link to {:?}, which is no file", show(path), show(target)))?;
        let inode = draft.inode_index(found);
        let mut names: Vec<_> = path.split(|byte| *byte == b'/').collect();
        let name = names.pop().unwrap_or_default();
        let mut directory = Draft::ROOT;
        for name in names {
            directory = match draft.child(directory, name).filter(|entry| draft.is_directory(*entry)) {
                Some(entry) => entry,
                None => {
                    let implied = draft.add_inode(Inode::implied_directory());
                    draft.put(directory, name, implied)
                }
            };
        }
        draft.put(directory, name, inode);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tar::{EntryType, Header};

    use super::*;
    use crate::{BuildError, BuildOptions, Builder, Inode, MergeError, MergeOptions, MergeReport, merge_with};

    /// Type, path, mode, target of a link.
    type Entry<'a> = (EntryType, &'a str, u32, &'a str);

    fn layer(dir: &Path, entries: &[Entry<'_>]) -> Result<(Bootstrap, LayerNotes), BuildError> {
        let mut archive = tar::Builder::new(Vec::new());
        for (kind, path, mode, link) in entries {
            let content: &[u8] = if *kind == EntryType::Regular { path.as_bytes() } else { b"" };
            let mut header = Header::new_gnu();
            header.set_path(path).unwrap();
            if !link.is_empty() {
                header.set_link_name(link).unwrap();
            }
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content).unwrap();
        }
        let archive = archive.into_inner().unwrap();
        let bootstrap = dir.join("bootstrap");
        let builder = Builder::new(BuildOptions::default());
        let (_, notes) = builder.build_layer(&archive[..], Path::new("layer"), &bootstrap, &dir.join("blobs"))?;
        Ok((Bootstrap::open(&bootstrap).unwrap(), notes))
    }

    fn merged(layers: &[(Bootstrap, LayerNotes)], output: &Path) -> Result<MergeReport, MergeError> {
        let (layers, notes): (Vec<_>, _) = layers.iter().cloned().unzip();
        merge_with(&layers, &MergeOptions { notes, ..MergeOptions::default() }, output)
    }

    fn at<'a>(image: &'a Bootstrap, path: &str) -> Inode<'a> {
        let nid = path.split('/').filter(|name| !name.is_empty()).fold(image.root(), |nid, name| {
            image
                .inode(nid)
                .unwrap()
                .lookup(name.as_bytes())
                .unwrap()
                .unwrap_or_else(|| panic!("no {name} of {path}"))
        });
        image.inode(nid).unwrap()
    }

    #[test]
    fn a_layer_leaves_to_lower_ones_what_is_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, file, link) = (EntryType::Directory, EntryType::Regular, EntryType::Link);
        let entries = [(directory, "./", 0o711, ""), (directory, "tmp/", 0o1777, ""), (file, "tmp/below", 0o600, "")];
        let lower = layer(dir.path(), &entries).unwrap();
        assert_eq!(lower.1, LayerNotes::default(), "it describes all that it has");
        let entries = [
            (file, "tmp/mine", 0o644, ""),
            (file, "new/mine", 0o644, ""),
            (link, "tmp/link", 0, "tmp/below"),
            (link, "other/again", 0, "tmp/link"),
        ];
        let upper = layer(dir.path(), &entries).unwrap();
        assert_eq!(upper.1.implied.len(), 4, "{:?}", upper.1);
        assert_eq!(upper.1.links.len(), 2);
        let output = dir.path().join("merged");
        merged(&[lower, upper.clone()], &output).unwrap();
        let image = Bootstrap::open(&output).unwrap();
        for (path, mode) in [("", 0o711), ("tmp", 0o1777), ("new", 0o755), ("other", 0o755)] {
            assert_eq!(at(&image, path).mode() & 0o7777, mode, "{path:?}");
        }
        let below = at(&image, "tmp/below");
        assert_eq!((at(&image, "tmp/link").nid(), at(&image, "other/again").nid()), (below.nid(), below.nid()));
        assert_eq!(below.nlink(), 3);
        // Alone it has no such file.
        let error = merged(&[upper], &output).unwrap_err();
        assert!(matches!(error, MergeError::Mismatch { layer: 1, .. }), "{error}");
    }
}

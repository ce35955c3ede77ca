//! What a layer leaves to those below it.

use std::collections::BTreeSet;

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tar::{EntryType, Header};

    use super::*;
    use crate::{Bootstrap, BuildError, BuildOptions, Builder, Inode, MergeError, merge_noted};

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
        merge_noted(&[lower, upper.clone()], &output).unwrap();
        let image = Bootstrap::open(&output).unwrap();
        for (path, mode) in [("", 0o711), ("tmp", 0o1777), ("new", 0o755), ("other", 0o755)] {
            assert_eq!(at(&image, path).mode() & 0o7777, mode, "{path:?}");
        }
        let below = at(&image, "tmp/below");
        assert_eq!((at(&image, "tmp/link").nid(), at(&image, "other/again").nid()), (below.nid(), below.nid()));
        assert_eq!(below.nlink(), 3);
        // Alone it has no such file.
        let error = merge_noted(&[upper], &output).unwrap_err();
        assert!(matches!(error, MergeError::Mismatch { layer: 1, .. }), "{error}");
    }
}

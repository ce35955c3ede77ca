//! What a `Prepare` says about the layer that it is for.
//!
//! containerd hands layer annotations that start with `containerd.io/snapshot/` to the snapshotter as labels, so the
//! marks of Nydus layers arrive by themselves. Which image a layer belongs to is added by whoever pulls: the CRI plugin
//! in one family of labels, clients of remote snapshotters (`ctr-remote`, nerdctl) in another. A plain `ctr images pull`
//! adds nothing.
//!
//! Labels are a stranger's words. What cannot be read counts as not said.

use shoal_proto::ObjectId;
use shoal_rafs::oci::{BLOB_MARK, BOOTSTRAP_MARK, Reference};
use shoal_snapshots::Labels;

/// The chain id under which containerd will look for the layer.
pub(crate) const TARGET: &str = "containerd.io/snapshot.ref";
/// The image's reference, by the CRI plugin.
pub(crate) const CRI_REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
/// Digest of the image's manifest, by the CRI plugin.
pub(crate) const CRI_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the layer, by the CRI plugin.
pub(crate) const CRI_LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// In front of `SNAPSHOTTER.reference` and `SNAPSHOTTER.digest`, by clients of remote snapshotters.
const REMOTE: &str = "containerd.io/snapshot/remote/";

/// How a layer of a lazy image is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// A data blob.
    Blob,
    /// The bootstrap.
    Bootstrap,
}

/// What is known of a layer that is to be unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerLabels {
    /// Its chain id.
    pub(super) target: String,
    /// The mark that its descriptor has.
    pub(super) mark: Option<Mark>,
    /// The image that it belongs to.
    pub(super) reference: Option<Reference>,
    /// Digest of that image's manifest.
    pub(super) manifest: Option<ObjectId>,
    /// Its own digest.
    pub(super) layer: Option<ObjectId>,
}

impl LayerLabels {
    /// None if the snapshot is for no layer, but for instance for a container.
    pub(super) fn parse(labels: &Labels) -> Option<Self> {
        let get = |key: &str| labels.get(key).map(String::as_str);
        let remote = |last: &str| {
            let is = |key: &str| key.strip_prefix(REMOTE).and_then(|key| key.strip_suffix(last)).is_some();
            labels.iter().find(|(key, _)| is(key)).map(|(_, value)| value.as_str())
        };
        let mark = match (get(BLOB_MARK), get(BOOTSTRAP_MARK)) {
            (_, Some("true")) => Some(Mark::Bootstrap),
            (Some("true"), _) => Some(Mark::Blob),
            _ => None,
        };
        let reference = get(CRI_REFERENCE).or_else(|| remote(".reference"));
        Some(Self {
            target: get(TARGET)?.to_owned(),
            mark,
            reference: reference.and_then(|text| text.parse().ok()),
            manifest: get(CRI_MANIFEST).and_then(digest),
            layer: get(CRI_LAYER).or_else(|| remote(".digest")).and_then(digest),
        })
    }
}

fn digest(text: &str) -> Option<ObjectId> {
    text.strip_prefix("sha256:")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(labels: &[(&str, &str)]) -> Option<LayerLabels> {
        LayerLabels::parse(&labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn both_families_say_the_same() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let cri = parse(&[
            (TARGET, "sha256:chain"),
            (BOOTSTRAP_MARK, "true"),
            (CRI_REFERENCE, "localhost:5000/app:1"),
            (CRI_MANIFEST, &digest),
            (CRI_LAYER, &digest),
            ("containerd.io/snapshot/cri.image-layers", &digest),
        ]);
        let cri = cri.unwrap();
        assert_eq!((cri.target.as_str(), cri.mark), ("sha256:chain", Some(Mark::Bootstrap)));
        assert_eq!((cri.manifest, cri.layer), (digest[7..].parse().ok(), digest[7..].parse().ok()));
        let remote = parse(&[
            (TARGET, "sha256:chain"),
            (BOOTSTRAP_MARK, "true"),
            ("containerd.io/snapshot/remote/stargz.reference", "localhost:5000/app:1"),
            ("containerd.io/snapshot/remote/stargz.digest", &digest),
            ("containerd.io/snapshot/remote/urls", "https://localhost/x"),
        ]);
        assert_eq!(remote.unwrap(), LayerLabels { manifest: None, ..cri });
    }

    #[test]
    fn what_cannot_be_read_was_not_said() {
        assert_eq!(parse(&[(CRI_REFERENCE, "localhost:5000/app:1")]), None, "a container has no target");
        let labels = parse(&[
            (TARGET, "t"),
            (BLOB_MARK, "yes"),
            (CRI_REFERENCE, "alpine"),
            (CRI_MANIFEST, "sha512:00"),
            (CRI_LAYER, "sha256:00"),
        ]);
        let nothing = LayerLabels { target: "t".into(), mark: None, reference: None, manifest: None, layer: None };
        assert_eq!(labels, Some(nothing));
    }
}

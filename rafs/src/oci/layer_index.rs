//! What is published next to an image whose layers are gzip as ever, so that it can be read lazily as it is.
//!
//! ```text
//! manifest of the image   <──subject── manifest of a lazy image: its first layer
//! (what is pulled)        <──subject── ...                      its first two layers
//!                         <──subject── ...                      all of it
//! ```
//!
//! Each is an ordinary manifest of a lazy image with an artifact type and an annotation that says how many layers it covers.
//! They are found as referrers of the image's manifest (OCI distribution specification, "Listing Referrers"), or in the index
//! under the tag `sha256-<digest>` where a registry lists none ("Referrers Tag Schema").
//!
//! A list of referrers is as trustworthy as whoever may push to the repository, also where the image itself is pinned by
//! its digest: an index decides what the files of the image are.

use serde_json::{Value, json};
use shoal_proto::ObjectId;

use super::{
    Descriptor, ManifestError, Platform, Registry, RegistryError, Source,
    document::{Content, Document},
};

/// What such a manifest says that it is.
pub(super) const OCI_REF_ARTIFACT: &str = "application/vnd.shoal.oci-ref.v1+json";
/// How many of the image's layers it covers, the lowest first. An annotation of the manifest and of its entry in a list.
pub(super) const LAYERS: &str = "dev.shoal.layers";

/// The lazy form of the first layers of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerIndex {
    /// How many layers, from the lowest.
    pub layers: usize,
    /// Its manifest.
    pub manifest: ObjectId,
}

/// Completes the entry of such a manifest in a list of referrers.
pub(super) fn describe(entry: &mut Value, layers: usize) {
    entry["artifactType"] = json!(OCI_REF_ARTIFACT);
    entry["annotations"] = json!({ LAYERS: layers.to_string() });
}

impl LayerIndex {
    /// The entry of a list of referrers, if it is one of these.
    fn of(descriptor: Descriptor, entry: &Value) -> Option<Self> {
        let artifact = entry.get("artifactType")?.as_str()?;
        let layers = entry.get("annotations")?.get(LAYERS)?.as_str()?.parse().ok()?;
        (artifact == OCI_REF_ARTIFACT).then_some(Self { layers, manifest: descriptor.id })
    }
}

impl Registry {
    /// The lazy forms that are published next to the image whose manifest is `image`, in the order of the list. Says nothing
    /// of what they are worth.
    ///
    /// # Errors
    /// Whatever the registry answers; that nothing is published is none.
    pub async fn layer_indexes(&self, source: &Source, image: ObjectId) -> Result<Vec<LayerIndex>, RegistryError> {
        let listed = self.referrers_of(source, image).await?;
        Ok(listed.iter().filter_map(|child| LayerIndex::of(child.descriptor, &child.raw)).collect())
    }
}

/// An image whose layers are tars, for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrdinaryManifest {
    /// Its own media type, OCI's or Docker's.
    pub media_type: String,
    /// The image's config.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// What is behind a digest, of an image that need not be lazy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ordinary {
    /// An image.
    Image(OrdinaryManifest),
    /// An index, and the image in it that is wanted.
    Index(Descriptor),
}

impl OrdinaryManifest {
    /// Reads an image, or finds the one for a platform in an index.
    ///
    /// # Errors
    /// It is neither, or the index has no such image.
    pub fn find(bytes: &[u8], platform: &Platform) -> Result<Ordinary, ManifestError> {
        let document = Document::parse(bytes)?;
        match &document.content {
            Content::Index(_) => document.select(platform).map(Ordinary::Index),
            Content::Image(links) => Ok(Ordinary::Image(Self {
                media_type: document.media_type,
                config: links.config.descriptor,
                layers: links.layers.iter().map(|link| link.descriptor).collect(),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entry: &Value) -> Option<LayerIndex> {
        LayerIndex::of(Descriptor { id: ObjectId::new([1; 32]), size: 1 }, entry)
    }

    #[test]
    fn an_entry_says_how_many_layers_it_covers() {
        let mut entry = json!({ "digest": "sha256:..", "size": 1 });
        assert_eq!(index(&entry), None);
        describe(&mut entry, 3);
        assert_eq!(index(&entry), Some(LayerIndex { layers: 3, manifest: ObjectId::new([1; 32]) }));
        for strange in [json!("-1"), json!(3), json!("all"), Value::Null] {
            let mut entry = entry.clone();
            entry["annotations"][LAYERS] = strange;
            assert_eq!(index(&entry), None, "{entry}");
        }
        entry["artifactType"] = json!("application/vnd.example");
        assert_eq!(index(&entry), None, "somebody else's");
    }
}

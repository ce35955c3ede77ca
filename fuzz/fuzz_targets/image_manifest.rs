//! Parses what a registry says of an image: a manifest, or an index of several.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use shoal_rafs::oci::Manifest;

fuzz_target!(|data: &[u8]| {
    let Ok(Manifest::Image(image)) = Manifest::parse(data) else { return };
    let ids: BTreeSet<_> = image.blobs.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids.len(), image.blobs.len(), "each once");
    assert!(image.blobs.len() < image.layers.len(), "the bootstrap is a layer, too");
    assert!(image.references.iter().all(|(_, meta)| ids.contains(meta)));
});

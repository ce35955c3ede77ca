//! Images that claim what is not so.

use shoal_rafs::oci::Layout;

use crate::{
    bed::Bed,
    image::{self, Layers},
};

#[test]
fn nobody_takes_the_name_of_anothers_layers() {
    let Some(bed) = Bed::start("false chain id") else { return };
    Layers::new().push_lazy(&bed.registry.layout(), "1");
    let layout = Layout::new(bed.registry.layout());
    // The same layers, the last of which claims to be somebody else's.
    let layers = image::manifest(&layout, "1")["layers"].as_array().expect("layers").clone();
    let diff_ids = [1, 2, 3].map(|n: u8| format!("sha256:{}", hex::encode([n; 32])));
    image::put(&layout, "liar", diff_ids.into(), layers);
    let refused = bed.daemon.try_ctl(&["rpull", &bed.registry.reference("liar")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("is not what its chain id"), "{said}");
    assert_eq!(bed.mounts(), [""; 0]);

    bed.collect_garbage();
    assert!(bed.snapshots().is_empty() && bed.directories().is_empty());
}

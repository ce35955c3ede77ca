//! Images that claim what is not so.

use serde_json::json;
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
    image::put(&layout, "liar", diff_ids.into(), layers.clone());
    let refused = bed.daemon.try_ctl(&["rpull", &bed.registry.reference("liar")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("is not what its chain id"), "{said}");
    assert_eq!(bed.mounts(), [""; 0]);

    // A blob layer under the name of an ordinary layer has no files, and nothing can stand on it.
    image::put(
        &layout,
        "blob",
        vec![format!("sha256:{}", "ab".repeat(32)); 2],
        vec![layers[0].clone(), json!(layers[2])],
    );
    let refused = bed.daemon.try_ctl(&["rpull", &bed.registry.reference("blob")]);
    assert!(!refused.status.success());
    let chain = format!("sha256:{}", "ab".repeat(32));
    if bed.snapshots().contains(&chain) {
        let said = bed.ctr_fails(&["snapshots", "--snapshotter", "shoal", "prepare", "victim", &chain]);
        assert!(said.contains("is a data blob layer"), "{said}");
    }
    bed.collect_garbage();
    assert!(bed.snapshots().is_empty() && bed.directories().is_empty());
}

//! What scripts read of a check: the fields that `docs/image-json.md` names.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{bed::Bed, source::*};
use crate::oci::check_image;

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The names in code marks of a part of the page.
fn documented(part: &str) -> BTreeSet<&'static str> {
    let page = include_str!("../../../../docs/image-json.md");
    let part = page.split("\n## ").find(|text| text.starts_with(part)).unwrap();
    part.split('`').skip(1).step_by(2).flat_map(|code| code.split(['{', '}', '[', ']', ',', ' ', '.'])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_has_the_fields_that_are_documented() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let (right, wrong) = (bed.reference("target", "v1"), bed.reference("wrong", "v1"));
    bed.convert(&right, &bed.options()).await.unwrap();
    let report = check_image(&bed.registry, &right, Some(&bed.source()), &[]).await.unwrap();
    let report = serde_json::to_value(&report).unwrap();
    assert_eq!(keys(&report), ["images", "ok", "reference"]);
    let found = &report["images"][0];
    assert_eq!(keys(found), ["compared", "image", "manifest", "ok", "platform", "problems"]);
    assert_eq!(keys(&found["compared"]), ["bytes", "files", "names"]);
    assert_eq!((&report["ok"], &found["platform"]), (&Value::Bool(true), &"linux/amd64".into()));
    assert!(found["manifest"].as_str().unwrap().starts_with("sha256:"));
    assert!(report["reference"].as_str().unwrap().ends_with(found["manifest"].as_str().unwrap()));
    let page = documented("`shoal image check REF --json`");
    for value in [&report, found, &found["compared"]] {
        assert!(keys(value).iter().all(|key| page.contains(key)), "{:?} of {page:?}", keys(value));
    }
    let page = documented("`shoal image check --json`");
    let blob = &found["image"]["blobs"][0];
    for value in [&found["image"], &found["image"]["inodes"], blob] {
        assert!(keys(value).iter().all(|key| page.contains(key)), "{:?} of {page:?}", keys(value));
    }

    // Another image's source.
    let other = [Layer::gzip(&Tar::default().file("other", b"other").end())];
    image(&bed.registry, &wrong, &other).await;
    let report = check_image(&bed.registry, &right, Some(&wrong), &[]).await.unwrap();
    let report = serde_json::to_value(&report).unwrap();
    assert_eq!((&report["ok"], &report["images"][0]["image"]["ok"]), (&Value::Bool(false), &Value::Bool(true)));
    assert_eq!(keys(&report["images"][0]["problems"][0]), ["place", "problem"]);
    // Alone nothing is compared.
    let report = serde_json::to_value(check_image(&bed.registry, &right, None, &[]).await.unwrap()).unwrap();
    assert_eq!(report["images"][0]["compared"], Value::Null);
}

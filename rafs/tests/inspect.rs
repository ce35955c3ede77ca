//! What `inspect` says of an image, as scripts see it.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use shoal_rafs::{BuildOptions, Compressor, inspect, inspect_path};

mod support;

use support::image::{Built, build};

fn image(dir: &std::path::Path) -> Built {
    let source = dir.join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/file"), support::noise(1, 0x1800)).unwrap();
    symlink("file", source.join("a/link")).unwrap();
    xattr::set(source.join("a/file"), "user.x", b"\x01\xff").unwrap();
    build(&source, dir, BuildOptions { compressor: Compressor::None, chunk_size: 0x1000, ..BuildOptions::default() })
}

fn path(built: &Built, path: &str) -> Value {
    serde_json::to_value(inspect_path(&built.image, path.as_bytes()).unwrap()).unwrap()
}

#[test]
fn an_image_tells_of_its_tables_and_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    let summary = serde_json::to_value(inspect(&built.image)).unwrap();
    assert_eq!(summary["super_blocks"]["chunk_size"], 0x1000);
    assert_eq!(summary["super_blocks"]["names"], 5);
    assert_eq!((&summary["names"], &summary["inodes"], &summary["prefetch"]), (&json!(5), &json!(5), &json!([])));
    let blob = &summary["blobs"][0];
    assert_eq!(blob["id"], built.report.blob.unwrap().to_string());
    assert_eq!((&blob["chunks"], &blob["named_chunks"], &blob["compressor"]), (&json!(2), &json!(2), &json!("none")));
    assert_eq!(blob["chunk_table_offset"], 0x1800);
}

#[test]
fn a_path_leads_to_an_inode_with_its_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    let file = path(&built, "/a/file");
    assert_eq!((&file["kind"], &file["size"]), (&json!("file"), &json!(0x1800)));
    assert_eq!(file["xattrs"], json!([["user.x", "01ff"]]));
    let chunks = file["chunks"].as_array().unwrap();
    let places: Vec<_> = chunks.iter().map(|chunk| (&chunk["file_offset"], &chunk["encoded_offset"])).collect();
    assert_eq!(places, [(&json!(0), &json!(0)), (&json!(0x1000), &json!(0x1000))]);
    assert_eq!(chunks[1]["decoded_size"], 0x800);
    let digest = blake3::hash(&support::noise(1, 0x1800)[..0x1000]);
    assert_eq!(chunks[0]["digest"], format!("blake3:{digest}"));

    let directory = path(&built, "a");
    let names: Vec<_> = directory["entries"].as_array().unwrap().iter().map(|entry| &entry["name"]).collect();
    assert_eq!(names, ["b", "file", "link"]);
    assert_eq!((&directory["chunks"], &directory["target"]), (&Value::Null, &Value::Null));
    assert_eq!(path(&built, "a/link")["target"], "file");
    assert_eq!(path(&built, "")["nid"], built.image.root().0);
    for nothing in ["b", "a/link/x", "a/file/x", "a/b/c"] {
        assert_eq!(path(&built, nothing), Value::Null, "{nothing}");
    }
}

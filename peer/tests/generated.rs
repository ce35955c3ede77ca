//! `src/generated` is what tonic makes of the schemas of the control API and of containerd's services: run with
//! `SHOAL_REGENERATE=1` after changing one of them.

use std::{env, fs, path::Path};

/// Compares, or regenerates, `packages` as tonic makes them of `schemas`.
fn up_to_date(folder: &str, schemas: &[&str], packages: &[&str], builder: tonic_prost_build::Builder) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = protox::compile(schemas, [root.join(folder)]).expect("the schemas compile");
    let out = tempfile::tempdir().expect("a temporary folder");
    builder.out_dir(out.path()).compile_fds(files).expect("tonic generates code");
    for package in packages {
        let code = fs::read_to_string(out.path().join(format!("{package}.rs"))).expect("the generated file");
        let path = root.join(format!("src/generated/{package}.rs"));
        if env::var_os("SHOAL_REGENERATE").is_some() {
            fs::write(&path, &code).expect("the checked-in file can be written");
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == code, "{} differs from its schema; run with SHOAL_REGENERATE=1", path.display());
    }
}

#[test]
fn the_control_api_is_up_to_date() {
    let builder = tonic_prost_build::configure().extern_path(".shoal.control.v1", "::shoal_proto::control");
    up_to_date("../proto/src", &["control.proto"], &["shoal.control.v1"], builder);
}

#[test]
fn what_the_daemon_serves_to_containerd_is_up_to_date() {
    let packages = ["containerd.types", "containerd.services.snapshots.v1"];
    up_to_date("src/containerd", &["types.proto", "snapshots.proto"], &packages, tonic_prost_build::configure());
}

#[test]
fn what_the_daemon_asks_of_containerd_is_up_to_date() {
    let (schemas, packages) = (
        ["content.proto", "images.proto", "leases.proto"],
        ["content", "images", "leases"].map(|name| format!("containerd.services.{name}.v1")),
    );
    let packages = packages.each_ref().map(String::as_str);
    up_to_date("src/containerd", &schemas, &packages, tonic_prost_build::configure().build_server(false));
}

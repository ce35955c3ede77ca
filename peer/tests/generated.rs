//! `src/generated` is what tonic makes of the control API's schema: run with `SHOAL_REGENERATE=1` after changing it.

use std::{env, fs, path::Path};

#[test]
fn generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schemas = root.join("../proto/src");
    let files = protox::compile(["control.proto"], [schemas]).expect("control.proto compiles");
    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .extern_path(".shoal.control.v1", "::shoal_proto::control")
        .compile_fds(files)
        .expect("tonic generates code");
    let code = fs::read_to_string(out.path().join("shoal.control.v1.rs")).expect("the generated file");
    let path = root.join("src/generated/shoal.control.v1.rs");
    if env::var_os("SHOAL_REGENERATE").is_some() {
        fs::write(&path, &code).expect("the checked-in file can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == code, "{} differs from its schema; run with SHOAL_REGENERATE=1", path.display());
}

//! `src/generated` is what prost makes of the schemas: run with `SHOAL_REGENERATE=1` after changing one of them.

use std::{env, fs, path::Path};

#[test]
fn generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = protox::compile(["wire.proto", "control.proto"], [root.join("src")]).expect("the schemas compile");
    let mut config = prost_build::Config::new();
    // What scripts read of `shoal ctl --json` are these messages.
    config.type_attribute(".shoal.control.v1", "#[derive(serde::Serialize)]");
    config.bytes([".shoal.wire.v1.Hello.membership"]).btree_map([".shoal.wire.v1.Hello.labels"]);
    let modules = files
        .file
        .into_iter()
        .map(|file| (prost_build::Module::from_protobuf_package_name(file.package()), file))
        .collect();
    for (module, code) in config.generate(modules).expect("prost generates code") {
        let path = root.join("src/generated").join(module.to_file_name_or("wire"));
        if env::var_os("SHOAL_REGENERATE").is_some() {
            fs::write(&path, &code).expect("the checked-in file can be written");
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == code, "{} differs from its schema; run with SHOAL_REGENERATE=1", path.display());
    }
}

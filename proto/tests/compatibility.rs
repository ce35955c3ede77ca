//! What the previous release says still means the same, and what this one says it can read: see "Versions" in `docs/design.md`.

use std::{collections::BTreeMap, path::Path};

use prost_build::Config;
use protox::prost_reflect::{DescriptorPool, MessageDescriptor};

fn schema(folder: &str) -> DescriptorPool {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = protox::compile(["wire.proto"], [folder]).expect("the schema compiles");
    DescriptorPool::from_file_descriptor_set(files).expect("a schema")
}

/// Field numbers with all that is to stay as it was.
fn fields(message: &MessageDescriptor) -> BTreeMap<u32, String> {
    let described = |field: protox::prost_reflect::FieldDescriptor| {
        let oneof = field.containing_oneof().map(|oneof| oneof.name().to_owned());
        (field.number(), format!("{} {:?} {:?} {oneof:?}", field.name(), field.kind(), field.cardinality()))
    };
    message.fields().map(described).collect()
}

#[test]
fn nothing_of_the_previous_schema_has_changed() {
    let (previous, now) = (schema("previous"), schema("src"));
    for message in previous.all_messages() {
        let name = message.full_name();
        let kept = now.get_message_by_name(name).unwrap_or_else(|| panic!("{name} is gone"));
        let kept = fields(&kept);
        for (number, field) in fields(&message) {
            assert_eq!(kept.get(&number), Some(&field), "field {number} of {name}");
        }
    }
    for values in previous.all_enums() {
        let name = values.full_name();
        let kept = now.get_enum_by_name(name).unwrap_or_else(|| panic!("{name} is gone"));
        for value in values.values() {
            let found = kept.get_value(value.number()).map(|value| value.name().to_owned());
            assert_eq!(found.as_deref(), Some(value.name()), "value {} of {name}", value.number());
        }
    }
}

#[test]
fn the_previous_code_is_what_its_schema_makes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("previous");
    let files = protox::compile(["wire.proto"], [&folder]).expect("the schema compiles");
    let mut config = Config::new();
    config.bytes([".shoal.wire.v1.Hello.membership"]).btree_map([".shoal.wire.v1.Hello.labels"]);
    let file = files.file.into_iter().next().expect("one file");
    let module = prost_build::Module::from_protobuf_package_name(file.package());
    let code = config.generate(vec![(module, file)]).expect("prost generates code").into_values().next();
    let found = std::fs::read_to_string(folder.join("shoal.wire.v1.rs")).expect("the code");
    assert!(Some(found) == code, "previous/shoal.wire.v1.rs is not what its schema makes");
}

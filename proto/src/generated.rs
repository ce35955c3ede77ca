//! What prost makes of the schemas, checked in so that building needs neither protoc nor a build script;
//! `tests/generated.rs` fails when it is not up to date.

/// The messages of the data plane, from `wire.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
#[rustfmt::skip]
#[path = "generated/shoal.wire.v1.rs"]
pub(crate) mod wire;

/// The messages of the control API, from `control.proto`. Serialised, they are what `shoal ctl --json` prints.
#[allow(missing_docs, unreachable_pub, clippy::all)]
#[rustfmt::skip]
#[path = "generated/shoal.control.v1.rs"]
pub mod control;

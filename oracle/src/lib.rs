//! An independent implementation of RAFS to compare with: the packages `nydus-builder` and `nydus-rafs`.
//!
//! [`build`] makes images with theirs, [`read`] reads images with theirs. What they say of an image is compared with what
//! `shoal-rafs` says of it in `tests/`. The program `peer-image` is [`build`] behind the part of the command line of
//! `nydus-image` that is used here, so that the original can be put in its place (`PEER_BUILDER=PATH`); `peer-mount` is [`mount`]
//! behind that of `nydusd`, and is measured by `make bench-mount` unless `PEER_DAEMON=PATH` names the original.

pub mod build;
pub mod mount;
pub mod read;

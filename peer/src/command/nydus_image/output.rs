//! The JSON that callers read.

use std::path::Path;

use serde::Serialize;
use shoal_rafs::{Blob, Bootstrap, Compressor};

use crate::command::Failure;

/// What was made or checked, with the names of `nydus-image`.
#[derive(Debug, Serialize)]
pub(super) struct Output {
    version: String,
    /// Path of the bootstrap; empty where it is in the blob alone.
    bootstrap: String,
    /// Ids of blobs.
    blobs: Vec<String>,
    external_bootstrap: String,
    external_blobs: Vec<String>,
    trace: serde_json::Map<String, serde_json::Value>,
    fs_version: &'static str,
    compressor: &'static str,
}

impl Output {
    pub(super) fn new(bootstrap: Option<&Path>, blobs: Vec<String>, compressor: Compressor) -> Self {
        Self {
            version: concat!("v", env!("CARGO_PKG_VERSION")).into(),
            bootstrap: bootstrap.map(|path| path.display().to_string()).unwrap_or_default(),
            blobs,
            external_bootstrap: String::new(),
            external_blobs: Vec::new(),
            trace: serde_json::Map::new(),
            fs_version: "6",
            compressor: compressor_name(compressor),
        }
    }

    /// What a bootstrap says of itself.
    pub(super) fn of(path: &Path, image: &Bootstrap) -> Self {
        let blobs = image.blobs().iter().map(|blob| blob.id.to_string()).collect();
        let fs_version = if image.blobs().iter().any(Blob::is_v5) { "5" } else { "6" };
        Self { fs_version, ..Self::new(Some(path), blobs, image.compressor()) }
    }

    /// Writes it, if anybody wants it.
    pub(super) fn write(&self, path: Option<&Path>) -> Result<(), Failure> {
        let Some(path) = path else { return Ok(()) };
        let text = serde_json::to_vec_pretty(self)?;
        Ok(std::fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?)
    }
}

fn compressor_name(compressor: Compressor) -> &'static str {
    match compressor {
        Compressor::None => "none",
        Compressor::Lz4 => "lz4_block",
        Compressor::Gzip => "gzip",
        Compressor::Zstd => "zstd",
    }
}

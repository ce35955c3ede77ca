//! The layers of an image on the way back: which trees they have, and their tars.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use flate2::{Compression, GzBuilder};
use shoal_proto::{BlobId, ObjectId};
use tempfile::{NamedTempFile, TempDir};

use super::{LayerCompression, ReverseError};
use crate::{
    BlobDirReader, BlobPaths, Bootstrap, ImageFile, UnpackError, UnpackReport, blob, merge,
    oci::{Descriptor, bootstrap_layer::Hashed, convert::same_tree::SameTree},
    unpack, unpack_layer,
};

/// Level of zstd, its own default.
const ZSTD_LEVEL: i32 = 3;

/// A tree that becomes a layer.
pub(super) struct Tree {
    bootstrap: Bootstrap,
    paths: BlobPaths,
    /// Whether it is that of a Nydus layer, with what that takes away from those below.
    pub(super) is_layer: bool,
}

/// A layer in a file.
pub(super) struct Written {
    pub(super) file: NamedTempFile,
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: ObjectId,
    /// Paths of sockets.
    pub(super) left_out: Vec<String>,
}

/// The trees that become layers, the lowest first: those in the blobs if they are what the image was made of, else the whole.
pub(super) fn trees(
    id: ObjectId,
    whole: Bootstrap,
    layers: &[BlobId],
    dir: &Path,
) -> Result<Vec<Tree>, ReverseError> {
    let broken = |source| ReverseError::broken(id, source);
    let mut tree = SameTree::of(&whole).map_err(broken)?;
    if let Some(layers) = trees_of_layers(layers, dir)?
        && let Some(merged) = merged(&layers)?
        && SameTree::of(&merged).map_err(broken)?.digest == tree.digest
    {
        return Ok(layers);
    }
    match tree.unfit.take() {
        Some(path) => Err(ReverseError::image(id, format!("{path} would take something away as a part of a layer"))),
        None => Ok(vec![Tree { bootstrap: whole, paths: BlobPaths::new(Some(dir), None), is_layer: false }]),
    }
}

/// The trees in the blobs, if every one of them has one.
fn trees_of_layers(layers: &[BlobId], dir: &Path) -> io::Result<Option<Vec<Tree>>> {
    let mut trees = Vec::new();
    for layer in layers {
        let path = dir.join(layer.to_string());
        let file = File::open(&path)?;
        // Without one the file would be taken for a bootstrap, and read as a whole.
        if blob::members(&file, file.metadata()?.len())?.is_empty() {
            return Ok(None);
        }
        let Ok(image) = ImageFile::open(&path) else { return Ok(None) };
        let Ok(bootstrap) = image.parse() else { return Ok(None) };
        trees.push(Tree { bootstrap, paths: image.blob_paths(Some(dir)), is_layer: true });
    }
    Ok((!trees.is_empty()).then_some(trees))
}

fn merged(layers: &[Tree]) -> io::Result<Option<Bootstrap>> {
    let layers: Vec<_> = layers.iter().map(|layer| layer.bootstrap.clone()).collect();
    let dir = TempDir::new()?;
    let output: PathBuf = dir.path().join("bootstrap");
    // What cannot be merged is not what the image was made of.
    Ok(merge(&layers, &output).ok().and_then(|_| Bootstrap::open(&output).ok()))
}

impl Tree {
    /// Writes it as a layer into a file in `dir`.
    pub(super) fn write(
        &self,
        id: ObjectId,
        dir: &Path,
        compression: LayerCompression,
    ) -> Result<Written, ReverseError> {
        let reader = BlobDirReader::at(&self.bootstrap, &self.paths);
        let reader = reader.map_err(|source| ReverseError::Blobs { id, source })?;
        let failed = |source| ReverseError::Unpack { id, source };
        let mut file = NamedTempFile::new_in(dir)?;
        let out = Hashed::new(BufWriter::with_capacity(1 << 20, file.as_file_mut()));
        let (mut out, diff_id, report) = match compression {
            LayerCompression::Gzip => {
                // As bootstrap layers are: the clock and the system have no part in it.
                let gzip = GzBuilder::new().mtime(0).operating_system(255).write(out, Compression::default());
                let (gzip, diff_id, report) = self.tar(&reader, gzip).map_err(failed)?;
                (gzip.finish()?, diff_id, report)
            }
            LayerCompression::Zstd => {
                let encoder = zstd::Encoder::new(out, ZSTD_LEVEL)?;
                let (encoder, diff_id, report) = self.tar(&reader, encoder).map_err(failed)?;
                (encoder.finish()?, diff_id, report)
            }
        };
        out.flush()?;
        let (_, id, size) = out.finish();
        Ok(Written { file, descriptor: Descriptor { id, size }, diff_id, left_out: report.sockets })
    }

    fn tar<W: Write>(&self, reader: &BlobDirReader, out: W) -> Result<(W, ObjectId, UnpackReport), UnpackError> {
        let mut tar = Hashed::new(out);
        let report = match self.is_layer {
            true => unpack_layer(&self.bootstrap, reader, &mut tar)?,
            false => unpack(&self.bootstrap, reader, &mut tar)?,
        };
        let (out, diff_id, _) = tar.finish();
        Ok((out, diff_id, report))
    }
}

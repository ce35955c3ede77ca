//! What a scenario takes from files beside it: the pieces of an image, and those that a start of it reads.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    path::{Path, PathBuf},
};

use shoal_rafs::{Bootstrap, ChunkId, PieceTable, chain, traced_chunks};

use super::ScenarioError;

/// An image as its bootstrap says it, all its blobs one after the other.
pub(super) struct Pieces {
    bootstrap: Bootstrap,
    tables: Vec<PieceTable>,
    /// Encoded sizes.
    pub(super) sizes: Vec<u64>,
    /// Where the pieces of each blob are among these.
    positions: HashMap<(u32, u32), u32>,
}

impl Pieces {
    /// The pieces that a bootstrap names.
    ///
    /// # Errors
    /// [`ScenarioError::Bootstrap`].
    pub(super) fn open(path: &Path) -> Result<Self, ScenarioError> {
        let fail = |reason: String| ScenarioError::Bootstrap { path: path.to_owned(), reason };
        let bootstrap = Bootstrap::open(path).map_err(|error| fail(chain(&error)))?;
        let (tables, sizes, positions) = Default::default();
        let mut pieces = Self { bootstrap, tables, sizes, positions };
        for blob in 0..pieces.bootstrap.blobs().len() as u32 {
            let table = pieces.bootstrap.piece_table(blob, None).map_err(|error| fail(chain(&error)))?;
            for number in 0..table.len() {
                let bytes = table.piece(number).map_or(0, |piece| piece.encoded().end - piece.encoded().start);
                if bytes > 0 {
                    pieces.positions.insert((blob, number), pieces.sizes.len() as u32);
                    pieces.sizes.push(bytes);
                }
            }
            pieces.tables.push(table);
        }
        if pieces.sizes.is_empty() { Err(fail("it names no piece".to_owned())) } else { Ok(pieces) }
    }

    /// The pieces of a start that `shoal mount --trace` recorded, each once, in the order in which they were read.
    ///
    /// # Errors
    /// [`ScenarioError::Trace`].
    pub(super) fn traced(&self, path: &Path) -> Result<Vec<u32>, ScenarioError> {
        let fail = |reason: String| ScenarioError::Trace { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|error| fail(chain(&error)))?;
        let chunks = traced_chunks(&self.bootstrap, file).map_err(|error| fail(chain(&error)))?;
        let mut seen = HashSet::new();
        let pieces = chunks.into_iter().filter_map(|chunk| self.of_chunk(chunk));
        let pieces: Vec<u32> = pieces.filter(|&piece| seen.insert(piece)).collect();
        if pieces.is_empty() { Err(fail("nothing was read".to_owned())) } else { Ok(pieces) }
    }

    fn of_chunk(&self, chunk: ChunkId) -> Option<u32> {
        let number = self.tables.get(chunk.blob as usize)?.piece_of_chunk(chunk.index)?;
        self.positions.get(&(chunk.blob, number)).copied()
    }
}

/// A path in a scenario is relative to the scenario's own.
pub(super) fn beside(scenario: &Path, path: &Path) -> PathBuf {
    scenario.parent().unwrap_or(Path::new(".")).join(path)
}

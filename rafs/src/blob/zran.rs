//! The chunk table of a gzip layer: a blob of its own, next to the layer.
//!
//! ```text
//! table, zstd   24 bytes per chunk
//!               40 bytes per context: encoded offset (8), decoded offset (8), offset of its window behind the contexts (8),
//!               encoded length (4), decoded length (4), length of the window (4), byte (1), bits (1), reserved (2)
//!               windows, up to 32 KiB each
//! header, 4096 bytes
//! ```

use super::{ChunkTable, ChunkTableError, Contexts, invalid};
use crate::layout::features;
use crate::zran::{CONTEXT, InflateContext, MAX_SPAN, WINDOW};

/// Feature bits of a chunk table for a gzip layer.
pub(crate) const FEATURES: u32 =
    features::ALIGNED | features::CHUNK_INFO_V2 | features::ZRAN | features::SEPARATE | features::CAP_TAR_TOC;

impl ChunkTable {
    /// Reads every context once.
    pub(super) fn check_contexts(&self) -> Result<(), ChunkTableError> {
        if !self.is_zran() {
            return Ok(());
        }
        let fail = |index, problem: &str| invalid("inflate context", format!("{index}: {problem}"));
        (0..self.header.contexts).try_for_each(|index| match self.read_context(index) {
            Ok(_) => Ok(()),
            Err(problem) => Err(fail(index, problem)),
        })
    }

    pub(super) fn read_context(&self, index: u32) -> Result<InflateContext, &'static str> {
        let start = self.header.context_offset + index as usize * CONTEXT;
        let bytes = self.bytes.get(start..start + CONTEXT).ok_or("it lies behind the table")?;
        let u64_at = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        // Within 40 bytes also for the last of them.
        let u32_at = |at: usize| u64_at(at) as u32;
        let windows = self.header.context_offset + self.header.contexts as usize * CONTEXT;
        let end = self.header.context_offset + self.header.context_size;
        let (window_offset, window_len) = (u64_at(16), u32_at(32) as usize);
        if window_len > WINDOW {
            return Err("its window is larger than 32 KiB");
        }
        let window = usize::try_from(window_offset).ok().and_then(|offset| windows.checked_add(offset));
        let window = window.and_then(|start| Some(start..start.checked_add(window_len)?));
        let window = window.filter(|window| window.end <= end).ok_or("its window lies behind the table")?;
        let (encoded_len, decoded_len) = (u32_at(24), u32_at(28));
        if !(1..=MAX_SPAN).contains(&encoded_len) || !(1..=MAX_SPAN).contains(&decoded_len) {
            return Err("it covers nothing, or more than 64 MiB");
        }
        let (byte, bits) = (bytes[36], bytes[37]);
        if bits > 7 {
            return Err("more bits than a byte can have left");
        }
        let encoded_offset = u64_at(0);
        encoded_offset.checked_add(encoded_len.into()).ok_or("its range overflows")?;
        Ok(InflateContext {
            encoded_offset,
            encoded_len,
            decoded_offset: u64_at(8),
            decoded_len,
            byte,
            bits,
            window: self.bytes.slice(window),
        })
    }
}

impl Contexts {
    /// Those of a gzip layer, with their windows.
    pub(crate) fn of_gzip_layer(contexts: &[InflateContext]) -> Self {
        let (mut bytes, mut window_offset) = (Vec::new(), 0);
        for context in contexts {
            bytes.extend(encode_context(context, window_offset));
            window_offset += context.window.len() as u64;
        }
        contexts.iter().for_each(|context| bytes.extend_from_slice(&context.window));
        Self { count: contexts.len() as u32, bytes }
    }
}

fn encode_context(context: &InflateContext, window_offset: u64) -> [u8; CONTEXT] {
    let mut bytes = [0; CONTEXT];
    bytes[..8].copy_from_slice(&context.encoded_offset.to_le_bytes());
    bytes[8..16].copy_from_slice(&context.decoded_offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&window_offset.to_le_bytes());
    bytes[24..28].copy_from_slice(&context.encoded_len.to_le_bytes());
    bytes[28..32].copy_from_slice(&context.decoded_len.to_le_bytes());
    bytes[32..36].copy_from_slice(&(context.window.len() as u32).to_le_bytes());
    (bytes[36], bytes[37]) = (context.byte, context.bits);
    bytes
}

//! Raw deflate (RFC 1951), from its beginning or from any block on.
//!
//! By zlib's interface, which alone of those that there are says where a block begins and starts at one; the code under it is
//! that of zlib-rs. All that is unsafe about such an interface is in here.

use std::ffi::CStr;
use std::os::raw::c_int;

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateGetDictionary, inflateInit2_,
    inflatePrime, inflateReset, inflateSetDictionary, z_stream, zlibVersion,
};

use super::WINDOW;

/// Window bits of a stream without a header.
const RAW: c_int = -15;
/// Bits of `data_type`: how many bits of the last byte are left, the block is the last one, a block has just ended.
const BITS_LEFT: c_int = 0x3F;
const LAST_BLOCK: c_int = 0x40;
const BLOCK_ENDED: c_int = 0x80;

/// Why inflating stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// There is no more input, or no more room.
    Short,
    /// Behind a block, with another to come; so many bits of the last byte, its upper ones, are the next block's.
    Block {
        /// 0 to 7.
        bits: u8,
    },
    /// Behind the last block.
    End,
}

/// What a step of inflating did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) consumed: usize,
    pub(super) produced: usize,
    pub(super) stop: Stop,
}

/// A stream that is being inflated. What it refers back to it keeps itself.
pub(super) struct Inflater {
    /// Its state points back to it, so it never moves.
    stream: Box<z_stream>,
}

impl Inflater {
    /// At the beginning of a stream.
    pub(super) fn new() -> Self {
        let mut stream = Box::<z_stream>::default();
        // SAFETY: the stream is as its type makes it, with an allocator; version and size are those of the library itself.
        let done = unsafe { inflateInit2_(&mut *stream, RAW, zlibVersion(), size_of::<z_stream>() as c_int) };
        // Anything else it says of a version, a size or window bits that it does not know.
        assert_eq!(done, Z_OK, "the inflater refuses its own parameters");
        Self { stream }
    }

    /// At a block, of which the byte before the input has the first `bits` bits, at most 7: its upper ones, given as the lower ones
    /// of `value`. `window` is what comes before the block.
    pub(super) fn at_block(bits: u8, value: u8, window: &[u8]) -> Self {
        let mut inflater = Self::new();
        let len = u32::try_from(window.len()).unwrap_or(u32::MAX);
        // SAFETY: the stream is initialised. The window is read during the call alone, and has `len` bytes.
        unsafe {
            inflatePrime(&mut *inflater.stream, bits.into(), value.into());
            inflateSetDictionary(&mut *inflater.stream, window.as_ptr(), len);
        }
        inflater
    }

    /// Goes back to the beginning of a stream.
    pub(super) fn reset(&mut self) {
        // SAFETY: the stream is initialised.
        unsafe { inflateReset(&mut *self.stream) };
    }

    /// Inflates until input or room is used up, the stream has ended, or a block has if it is to stop there.
    ///
    /// # Errors
    /// The input is no deflate, in words.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], blocks: bool) -> Result<Step, &'static str> {
        let (room_in, room_out) = (clamped(input.len()), clamped(output.len()));
        let stream = &mut *self.stream;
        (stream.next_in, stream.avail_in) = (input.as_ptr(), room_in);
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), room_out);
        // SAFETY: the stream is initialised. Input and output are those of the slices, which are borrowed longer than the call lasts,
        // and no longer than they.
        let done = unsafe { inflate(stream, if blocks { Z_BLOCK } else { Z_NO_FLUSH }) };
        let (consumed, produced) = (room_in - stream.avail_in, room_out - stream.avail_out);
        let bits = stream.data_type & BITS_LEFT;
        let stop = match done {
            Z_STREAM_END => Stop::End,
            Z_OK if stream.data_type & (BLOCK_ENDED | LAST_BLOCK) == BLOCK_ENDED && bits < 8 => {
                Stop::Block { bits: bits as u8 }
            }
            // The latter: no step could be made.
            Z_OK | Z_BUF_ERROR => Stop::Short,
            _ => return Err(self.problem()),
        };
        Ok(Step { consumed: consumed as usize, produced: produced as usize, stop })
    }

    /// What was inflated last, 32 KiB at most: what a block that follows can refer to.
    pub(super) fn window(&self) -> Vec<u8> {
        let (mut window, mut len) = (vec![0; WINDOW], 0);
        // SAFETY: the stream is initialised, and keeps no more than there is room for.
        unsafe { inflateGetDictionary(&*self.stream, window.as_mut_ptr(), &mut len) };
        window.truncate(len as usize);
        window
    }

    fn problem(&self) -> &'static str {
        let message = self.stream.msg;
        if message.is_null() {
            return "it needs what is not there";
        }
        // SAFETY: where there is a message it is a string constant of the library.
        unsafe { CStr::from_ptr(message) }.to_str().unwrap_or("unknown")
    }
}

/// What does not fit into zlib's lengths is left for the next step.
fn clamped(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: the stream is initialised, and nobody uses it any more.
        unsafe { inflateEnd(&mut *self.stream) };
    }
}

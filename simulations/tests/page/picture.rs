//! PNG files as browsers write them: eight bits a channel, red, green, blue and perhaps alpha, not interlaced. See the PNG
//! specification, third edition: chunks in section 5, filters in section 9.

use std::{io::Read, path::Path};

/// A picture.
pub(crate) struct Picture {
    pub(crate) width: usize,
    pub(crate) height: usize,
    channels: usize,
    bytes: Vec<u8>,
}

impl Picture {
    pub(crate) fn read(path: &Path) -> Self {
        let file = std::fs::read(path).unwrap();
        let mut rest = file.strip_prefix(b"\x89PNG\r\n\x1a\n").expect("a PNG file");
        let (mut header, mut packed) = (Vec::new(), Vec::new());
        // Length, kind, as many bytes, checksum.
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let (kind, after) = after.split_at(4);
            let (data, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            match kind {
                b"IHDR" => header.extend_from_slice(data),
                b"IDAT" => packed.extend_from_slice(data),
                _ => {}
            }
            rest = &after[4..];
        }
        let side = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().unwrap()) as usize;
        let (width, height) = (side(0), side(4));
        let channels = match &header[8..] {
            [8, 2, 0, 0, 0] => 3,
            [8, 6, 0, 0, 0] => 4,
            other => panic!("another kind of PNG: {other:?}"),
        };
        let mut filtered = Vec::new();
        flate2::read::ZlibDecoder::new(&packed[..]).read_to_end(&mut filtered).unwrap();
        assert_eq!(filtered.len(), height * (width * channels + 1));
        Self { width, height, channels, bytes: unfilter(&filtered, width * channels, channels) }
    }

    /// Red, green, blue.
    pub(crate) fn at(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * self.channels;
        [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]]
    }
}

/// Each row begins with a number that says from which neighbours its bytes are told as differences.
fn unfilter(filtered: &[u8], row_len: usize, pixel: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut above = vec![0; row_len];
    for row in filtered.chunks(row_len + 1) {
        let mut this = vec![0u8; row_len];
        for at in 0..row_len {
            let up = above[at];
            let (left, up_left) = if at < pixel { (0, 0) } else { (this[at - pixel], above[at - pixel]) };
            let from = match row[0] {
                0 => 0,
                1 => left,
                2 => up,
                3 => left.midpoint(up),
                4 => nearest(left, up, up_left),
                other => panic!("filter {other}"),
            };
            this[at] = row[1 + at].wrapping_add(from);
        }
        bytes.extend_from_slice(&this);
        above = this;
    }
    bytes
}

/// The one of three neighbours that is nearest to `left + up - up_left` (Paeth).
fn nearest(left: u8, up: u8, up_left: u8) -> u8 {
    let guess = i32::from(left) + i32::from(up) - i32::from(up_left);
    [left, up, up_left].into_iter().min_by_key(|&byte| (guess - i32::from(byte)).abs()).unwrap_or_default()
}

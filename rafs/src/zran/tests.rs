use std::io::{self, Read, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

/// Words of many kinds: some repeat from far back, some are noise.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 600);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let back = (state >> 8) as usize % 40_000;
        match state % 3 {
            0 if back > 600 && back <= bytes.len() => {
                let start = bytes.len() - back;
                bytes.extend_from_within(start..start + (state >> 40) as usize % 600);
            }
            1 => bytes.extend(std::iter::repeat_n(b'a' + (state >> 30) as u8 % 20, (state >> 50) as usize % 300)),
            _ => bytes.extend(state.to_le_bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

fn gzip(bytes: &[u8], level: u32, members: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    for part in bytes.chunks(bytes.len().div_ceil(members).max(1)) {
        let mut encoder = flate2::GzBuilder::new()
            .filename("name")
            .comment("comment")
            .extra(vec![7; 9])
            .write(Vec::new(), Compression::new(level));
        encoder.write_all(part).unwrap();
        stream.extend(encoder.finish().unwrap());
    }
    stream
}

fn index(stream: &[u8]) -> io::Result<(Vec<u8>, Vec<Checkpoint>)> {
    let mut indexer = Indexer::new(stream, None);
    let mut decoded = Vec::new();
    indexer.read_to_end(&mut decoded)?;
    Ok((decoded, indexer.finish().2))
}

/// Gives so many bytes at a time.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.1.min(buffer.len());
        self.0.read(&mut buffer[..len])
    }
}

#[test]
fn an_index_does_not_depend_on_how_the_stream_arrives() {
    let stream = gzip(&content(7, 3_000_000), 6, 2);
    let index = |step| {
        let mut indexer = Indexer::new(Trickle(&stream, step), None);
        let (position, mut positions, mut buffer) = (indexer.position(), Vec::new(), [0; 700]);
        while indexer.read(&mut buffer).unwrap() > 0 {
            positions.push(position.get());
        }
        (positions, indexer.finish())
    };
    let expected = index(stream.len());
    for step in [1, 777, 65_536] {
        assert!(index(step) == expected, "{step} bytes at a time");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_checkpoint_leads_to_what_follows_it(
        seed: u64,
        len in 1usize..7_000_000,
        level in 0u32..10,
        members in 1usize..5,
        part in 1usize..300_000,
    ) {
        let plain = content(seed, len);
        let stream = gzip(&plain, level, members);
        let (decoded, checkpoints) = index(&stream).unwrap();
        prop_assert!(decoded == plain);
        prop_assert!(!checkpoints.is_empty());
        for checkpoint in checkpoints {
            let (encoded, start) = (checkpoint.encoded_offset as usize, checkpoint.decoded_offset as usize);
            for decoded_len in [part.min(len - start), len - start] {
                let context = InflateContext { decoded_len: decoded_len as u32, ..checkpoint.clone() };
                let found = context.inflate(&stream[encoded..]).unwrap();
                prop_assert!(found == plain[start..start + decoded_len]);
            }
            let beyond = InflateContext { decoded_len: (len - start + 1) as u32, ..checkpoint };
            prop_assert!(beyond.inflate(&stream[encoded..]).is_err());
        }
    }

    #[test]
    fn any_bytes_end_in_an_error_or_a_stream(bytes in proptest::collection::vec(any::<u8>(), 0..300), flip: usize) {
        let _ = index(&bytes);
        let mut stream = gzip(&content(1, 3000), 6, 2);
        let len = stream.len();
        stream[flip % len] ^= 1;
        let _ = index(&stream);
        let context = |byte, bits| InflateContext {
            encoded_offset: 0,
            encoded_len: 1,
            decoded_offset: 0,
            decoded_len: 5000,
            byte,
            bits,
            window: Bytes::copy_from_slice(&bytes),
        };
        for bits in 0..8 {
            let _ = context(flip as u8, bits).inflate(&stream);
        }
    }
}

#[test]
fn positions_are_those_of_the_bytes_that_were_read() {
    let plain = content(3, 300_000);
    let stream = gzip(&plain, 6, 1);
    let mut indexer = Indexer::new(stream.as_slice(), None);
    let position = indexer.position();
    let mut last = 0;
    for (number, part) in plain.chunks(1000).enumerate() {
        let mut found = vec![0; part.len()];
        indexer.read_exact(&mut found).unwrap();
        assert_eq!(found, part);
        let position = position.get();
        assert_eq!(position.decoded, (number as u64 * 1000) + part.len() as u64);
        assert!(position.encoded >= last && position.encoded <= stream.len() as u64);
        last = position.encoded;
    }
    assert_eq!(indexer.read(&mut [0; 10]).unwrap(), 0);
    assert_eq!(position.get().encoded, stream.len() as u64);
}

#[test]
fn what_is_wrong_with_a_stream_is_an_error() {
    let stream = gzip(&content(5, 100_000), 6, 2);
    let problem = |stream: &[u8]| index(stream).map(|(decoded, _)| decoded.len()).unwrap_err().to_string();
    assert!(problem(&[&stream[..], b"garbage at the end"].concat()).contains("what follows is no gzip member"));
    assert!(problem(b"no gzip at all").contains("no gzip member"));
    for len in [0, 5, 20, stream.len() / 2, stream.len() - 9, stream.len() - 1] {
        assert_eq!(index(&stream[..len]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{len} bytes");
    }
    let mut wrong = stream.clone();
    *wrong.last_mut().unwrap() ^= 1;
    assert!(problem(&wrong).contains("checksum or length"));
    // A name that does not end.
    assert!(
        problem(&[&[0x1F, 0x8B, 8, 8, 0, 0, 0, 0, 0, 3][..], &vec![b'n'; 100_000]].concat()).contains("does not end")
    );
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(b"x").unwrap();
    assert_eq!(index(&encoder.finish().unwrap()).unwrap().0, b"x");
}

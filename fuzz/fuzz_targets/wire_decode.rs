//! Decodes frames, bitfields, hash lists and traces of starts as a stranger may send them: an error or a message within its limits, that encodes to
//! what decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_proto::{Bitfield, HashList, MAX_PAYLOAD, StartTrace, decode_header, encode_header};

fuzz_target!(|data: &[u8]| {
    if let Ok(Some((message, taken))) = decode_header(data) {
        assert!(taken <= data.len());
        assert!(message.payload_len() <= MAX_PAYLOAD);
        let mut bytes = Vec::new();
        encode_header(&message, &mut bytes).expect("what came in can go out");
        assert_eq!(decode_header(&bytes), Ok(Some((message, bytes.len()))));
    }
    if let Ok(field) = Bitfield::decode(data, 1 << 16) {
        assert!(field.len() <= 1 << 16);
        assert_eq!(field.iter().count(), field.count() as usize);
        assert_eq!(Bitfield::decode(&field.encode(), 1 << 16), Ok(field));
    }
    if let Ok(list) = HashList::parse(data) {
        assert_eq!(list.encode(), data);
    }
    if let Ok(trace) = StartTrace::parse(data) {
        assert!(trace.pieces().count() <= StartTrace::MAX_PIECES);
        assert_eq!(trace.encode(), data);
    }
});

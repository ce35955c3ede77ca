//! Gives a keeper packets, each behind its length in two bytes: whatever they are, each has an answer that can be read, what is
//! kept is what was asked for, and a packet that means something has no other form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_keeper::{MAX_MOUNTS, MAX_PACKET, Reply, Request, Table};

fuzz_target!(|data: &[u8]| {
    let (mut table, mut rest) = (Table::default(), data);
    while let Some((len, more)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes(*len)).min(more.len());
        let (packet, more) = more.split_at(len);
        rest = more;
        if let Ok(reply) = Reply::decode(packet) {
            assert_eq!(reply.encode(), packet);
        }
        let reply = match Request::decode(packet) {
            Ok(request) => {
                assert_eq!(request.encode(), packet);
                // Every other packet comes with a connection.
                let (reply, connection) = table.answer(request, (len % 2 == 0).then_some(()));
                assert_eq!(connection.is_some(), matches!(reply, Reply::Kept(_) | Reply::Group));
                reply
            }
            Err(malformed) => Reply::Refused { reason: malformed.to_string() },
        };
        let answer = reply.encode();
        assert!(answer.len() <= MAX_PACKET && table.len() <= MAX_MOUNTS);
        assert_eq!(Reply::decode(&answer), Ok(reply));
    }
});

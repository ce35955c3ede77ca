use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn field(len: u32, pieces: &BTreeSet<u32>) -> Bitfield {
    let mut field = Bitfield::new(len);
    for &piece in pieces {
        field.insert(piece);
    }
    field
}

fn sets() -> impl Strategy<Value = (u32, BTreeSet<u32>, BTreeSet<u32>)> {
    // Around the word size, and long enough for both wire forms to win.
    prop_oneof![0..4u32, 62..67u32, 126..131u32, 1000..1100u32].prop_flat_map(|len| {
        let set = || {
            let noise = proptest::collection::btree_set(0..len.max(1), 0..len.max(1) as usize);
            let run = (0..len.max(1), 0..len.max(1)).prop_map(|(a, b)| (a.min(b)..a.max(b)).collect());
            prop_oneof![noise, run].prop_map(move |set: BTreeSet<u32>| set.into_iter().filter(|&p| p < len).collect())
        };
        (Just(len), set(), set())
    })
}

proptest! {
    #[test]
    fn behaves_as_a_set((len, a, b) in sets(), probe in 0..1200u32, window in 0..1200u32) {
        let (fa, fb) = (field(len, &a), field(len, &b));
        prop_assert_eq!(fa.count() as usize, a.len());
        prop_assert_eq!(fa.iter().collect::<BTreeSet<_>>(), a.clone());
        prop_assert_eq!(fa.contains(probe), a.contains(&probe));
        prop_assert_eq!(fa.next_set(probe), a.range(probe..).next().copied());
        prop_assert_eq!(fa.next_unset(probe), (probe..len).find(|p| !a.contains(p)));
        prop_assert_eq!(fa.next_common(&fb, probe), a.intersection(&b).copied().find(|&p| p >= probe));
        prop_assert_eq!(fa.runs().flatten().collect::<Vec<_>>(), a.iter().copied().collect::<Vec<_>>());
        for (op, expected) in [
            (Bitfield::union_with as fn(&mut Bitfield, &Bitfield), &a | &b),
            (Bitfield::intersect_with, &a & &b),
            (Bitfield::subtract, &a - &b),
        ] {
            let mut got = fa.clone();
            op(&mut got, &fb);
            prop_assert_eq!(got, field(len, &expected));
        }
        let part: BTreeSet<_> = a.iter().filter_map(|p| p.checked_sub(probe)).filter(|&p| p < window).collect();
        prop_assert_eq!(fa.window(probe, window), field(window, &part));
        let mut ranged = fa.clone();
        ranged.insert_range(probe..window);
        prop_assert_eq!(ranged, field(len, &a.iter().copied().chain(probe..window).collect()));
        let word: BTreeSet<u32> = (0..64).filter(|&bit| fa.bits_from(probe) >> bit & 1 == 1).map(|bit| probe + bit).collect();
        prop_assert_eq!(word, a.range(probe..probe.saturating_add(64)).copied().collect());
        let mut copied = fb.clone();
        (0..len.div_ceil(64) + 1).for_each(|at| copied.set_word(at, fa.bits_from(at * 64)));
        prop_assert_eq!(&copied, &fa);
        (0..len.div_ceil(64) + 1).for_each(|at| copied.set_word(at, u64::MAX));
        prop_assert_eq!(copied, Bitfield::full(len));
        let mut less = fa.clone();
        prop_assert_eq!(less.remove(probe), a.contains(&probe));
        prop_assert_eq!(less.count() as usize, a.len() - usize::from(a.contains(&probe)));
    }

    #[test]
    fn wire_form_round_trips_and_is_compact((len, a, _) in sets()) {
        let field = field(len, &a);
        let bytes = field.encode();
        prop_assert!(bytes.len() <= len.div_ceil(8) as usize + 12, "{} bytes for {len} pieces", bytes.len());
        prop_assert_eq!(Bitfield::decode(&bytes, len), Ok(field));
        if len > 0 {
            prop_assert_eq!(Bitfield::decode(&bytes, len - 1), Err(BitfieldError::TooLong { found: len, limit: len - 1 }));
        }
    }

    #[test]
    fn arbitrary_bytes_are_a_bitfield_or_an_error(bytes: Vec<u8>) {
        if let Ok(field) = Bitfield::decode(&bytes, 4096) {
            prop_assert!(field.len() <= 4096);
            prop_assert_eq!(field.iter().count(), field.count() as usize);
            prop_assert_eq!(Bitfield::decode(&field.encode(), 4096), Ok(field));
        }
    }
}

#[test]
fn a_full_field_of_any_size_is_a_few_bytes() {
    for len in [1, 64, 65, MAX_WIRE_PIECES] {
        let full = Bitfield::full(len);
        assert!(full.is_full());
        assert!(full.encode().len() < 16, "{len}");
    }
}

#[test]
fn hostile_forms_are_refused() {
    let decode = |length, runs: &[u32], bits: &[u8]| {
        Bitfield::from_wire(&wire::Bitfield { length, runs: runs.to_vec(), bits: bits.to_vec() }, 100)
    };
    assert_eq!(decode(u32::MAX, &[0, 1], &[]), Err(BitfieldError::TooLong { found: u32::MAX, limit: 100 }));
    assert_eq!(decode(9, &[], &[1]), Err(BitfieldError::WrongBits { found: 1, length: 9 }));
    assert_eq!(decode(9, &[], &[1, 2]), Err(BitfieldError::WrongBits { found: 2, length: 9 }));
    assert_eq!(decode(9, &[8, 2], &[]), Err(BitfieldError::WrongRuns { length: 9 }));
    assert_eq!(decode(9, &[8, u32::MAX], &[]), Err(BitfieldError::WrongRuns { length: 9 }));
    assert_eq!(decode(9, &[0, 9], &[0xff, 1]), Err(BitfieldError::TwoForms));
}

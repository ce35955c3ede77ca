//! What is on disk: variants, objects, mounts, the lock, and damage to any of it.

use std::{ffi::OsString, io::Write, os::unix::ffi::OsStringExt};

use super::*;

fn opened(dir: &tempfile::TempDir) -> Store {
    Store::open(dir.path(), manual()).unwrap()
}

#[test]
fn a_second_owner_is_refused_and_told_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let handle = store.open_blob(&table(1, 1, &[(0, 1)])).unwrap();
    let refusal = || Store::open(dir.path(), manual()).expect_err("a handle still uses the directory").to_string();
    let me = format!("pid {} (", std::process::id());
    assert!(refusal().contains(&me), "{}", refusal());
    drop(store);
    assert!(refusal().contains(&me), "{}", refusal());
    drop(handle);
    opened(&dir);
}

#[test]
fn images_share_a_variant_exactly_when_they_agree() {
    let dir = tempfile::tempdir().unwrap();
    let place = |number: u64| number * u64::from(PIECE);
    // (what, the image, its variant)
    let cases = [
        ("the first", table(1, 4, &[(0, 1), (2, 1)]), 0),
        ("a part of it", table(1, 4, &[(2, 1)]), 0),
        ("more than it", table(1, 4, &[(2, 1), (3, 1)]), 0),
        ("another digest", table(1, 4, &[(0, 2)]), 1),
        ("more of that", table(1, 4, &[(0, 2), (1, 2)]), 1),
        ("what only the third named", table(1, 4, &[(2, 2), (3, 2)]), 1),
        ("another place", table_of(1, 4, vec![piece_at(0, 1, place(0) + 1)]), 2),
        ("a new piece on top of an old one", table_of(1, 4, vec![piece_at(1, 1, place(0) + 3)]), 2 + 1),
        ("another number of pieces", table(1, 5, &[(0, 1)]), 4),
        ("another blob", table(2, 4, &[(0, 2)]), 0),
    ];
    for round in 0..2 {
        // In the second round nothing is known but what was recorded.
        let store = opened(&dir);
        for (what, table, variant) in &cases {
            let handle = store.open_blob(table).unwrap();
            assert_eq!(handle.key(), BlobKey { blob: table.blob(), variant: *variant }, "{what}, round {round}");
        }
    }
}

/// Two pieces of a gzip layer that share ten bytes of it.
fn overlapping() -> Arc<PieceTable> {
    let piece = |number: u32, encoded_offset, kept_offset| {
        let (decoded_offset, digest) = (u64::from(number) * 4096, digest(b""));
        let chunk = Chunk { index: number, digest, decoded_offset, decoded_len: 1, compressed: true };
        let context = InflateContext {
            encoded_offset,
            encoded_len: PIECE,
            decoded_offset,
            decoded_len: 1,
            byte: 0,
            bits: 0,
            window: Bytes::new(),
        };
        Piece::inflated(number, context, kept_offset, vec![(chunk, 0)])
    };
    table_of(1, 2, vec![piece(0, 0, 0), piece(1, u64::from(PIECE) - 10, PIECE.into())])
}

/// Deflate has many encodings: that a piece verifies does not say that it has the bytes of the layer.
#[test]
fn pieces_that_overlap_in_a_gzip_layer_keep_their_own_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let store = opened(&dir);
        let handle = store.open_blob(&overlapping()).unwrap();
        for (piece, seed) in [(0, 1), (1, 2)] {
            assert_eq!(handle.write(piece, &content(piece, seed)).unwrap(), round == 0);
        }
        store.flush().unwrap();
        for (piece, seed) in [(0, 1), (1, 2)] {
            assert_eq!(handle.read(piece).unwrap().unwrap(), content(piece, seed), "round {round}");
        }
    }
}

#[test]
fn what_one_image_wrote_the_agreeing_may_read_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let open = |pieces: &[(u32, u8)]| store.open_blob(&table(1, 3, pieces)).unwrap();
    let (first, agreeing, liar) = (open(&[(0, 1), (1, 1)]), open(&[(1, 1)]), open(&[(1, 7)]));
    assert!(first.write(1, &content(1, 1)).unwrap());
    assert!(agreeing.is_present(1) && !liar.is_present(1));
    assert!(liar.write(1, &content(1, 7)).unwrap());
    for (handle, seed) in [(&first, 1), (&agreeing, 1), (&liar, 7)] {
        assert_eq!(handle.read(1).unwrap().unwrap(), content(1, seed));
    }
    assert_ne!(first.fingerprint(1), liar.fingerprint(1));
    assert_eq!(first.fingerprint(1), agreeing.fingerprint(1));
    assert_eq!(agreeing.fingerprint(0), first.table().piece(0).map(Piece::fingerprint));
    assert_eq!(first.fingerprint(2), None);
}

#[test]
fn bytes_of_another_length_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let handle = opened(&dir).open_blob(&table(1, 1, &[(0, 1)])).unwrap();
    for len in [0, 1, PIECE as usize - 1, PIECE as usize + 1] {
        let refused = handle.write(0, &vec![0; len]);
        assert!(matches!(refused, Err(StoreError::WrongLength { expected: 21, .. })), "{len}");
    }
    assert!(!handle.is_present(0));
}

#[test]
fn variants_are_bounded_and_the_one_not_in_use_goes_with_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions { variants_per_blob: 2, ..manual() }).unwrap();
    let open = |seed| store.open_blob(&table(1, 1, &[(0, seed)]));
    let (first, second) = (open(1).unwrap(), open(2).unwrap());
    assert!(matches!(open(3), Err(StoreError::TooManyVariants { limit: 2, .. })));
    second.write(0, &content(0, 2)).unwrap();
    store.flush().unwrap();
    assert!(store.find_digest(&digest(&content(0, 2))).unwrap().is_some());
    drop(second);
    let third = open(3).unwrap();
    assert_eq!((first.key().variant, third.key().variant), (0, 1));
    assert!(!third.is_present(0));
    assert_eq!(store.find_digest(&digest(&content(0, 2))).unwrap(), None);
    third.write(0, &content(0, 3)).unwrap();
    store.flush().unwrap();
    // The place is in use again, by other bytes.
    assert_eq!(store.find_digest(&digest(&content(0, 2))).unwrap(), None);
}

#[test]
fn digests_lead_to_durable_pieces_only() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let handle = store.open_blob(&table(1, 3, &[(2, 1)])).unwrap();
    let wanted = digest(&content(2, 1));
    handle.write(2, &content(2, 1)).unwrap();
    assert_eq!(store.find_digest(&wanted).unwrap(), None);
    store.flush().unwrap();
    let (place, encoded) = store.find_digest(&wanted).unwrap().unwrap();
    assert_eq!((place.key, place.piece, place.chunk), (handle.key(), 2, 2));
    assert_eq!(store.read_place(place.key, encoded).unwrap().unwrap(), content(2, 1));
    assert_eq!(store.read_place(place.key, 1 << 40..(1 << 40) + 1).unwrap(), None);
    handle.forget(2).unwrap();
    assert_eq!(store.find_digest(&wanted).unwrap(), None);
}

#[test]
fn bytes_gone_from_the_disk_are_not_present() {
    let dir = tempfile::tempdir().unwrap();
    let image = table(1, 4, &[(0, 1), (1, 1), (2, 1), (3, 1)]);
    let encoded = dir.path().join("blobs").join(image.blob().to_string()).join("encoded");
    let fill = || {
        let store = opened(&dir);
        let handle = store.open_blob(&image).unwrap();
        for piece in 0..4 {
            let missing = !handle.is_present(piece);
            assert_eq!(handle.write(piece, &content(piece, 1)).unwrap(), missing);
        }
        store.close().unwrap();
    };
    // (bytes left, pieces left)
    for (left, pieces) in [(Some(4 * PIECE - 1), 3), (Some(PIECE), 1), (Some(0), 0), (None, 0)] {
        fill();
        match left {
            Some(left) => fs::File::options().write(true).open(&encoded).unwrap().set_len(left.into()).unwrap(),
            None => fs::remove_dir_all(encoded.parent().unwrap()).unwrap(),
        }
        let handle = opened(&dir).open_blob(&image).unwrap();
        assert_eq!(handle.present().iter().collect::<Vec<_>>(), (0..pieces).collect::<Vec<_>>());
        assert_all_present_verify(&handle);
    }
    // While it is open.
    fill();
    let handle = opened(&dir).open_blob(&image).unwrap();
    fs::File::options().write(true).open(&encoded).unwrap().set_len(0).unwrap();
    assert_eq!(handle.read(3).unwrap(), None);
    assert!(!handle.is_present(3) && !handle.durable().contains(3));
    assert!(handle.write(3, &content(3, 1)).unwrap());
    assert_eq!(handle.read(3).unwrap().unwrap(), content(3, 1));
}

#[test]
fn blobs_that_the_index_does_not_know_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let image = table(1, 1, &[(0, 1)]);
    {
        let store = opened(&dir);
        store.open_blob(&image).unwrap().write(0, &content(0, 1)).unwrap();
        store.close().unwrap();
    }
    let blobs = dir.path().join("blobs");
    fs::create_dir(blobs.join("not-ours")).unwrap();
    fs::write(dir.path().join("index/CURRENT"), "damage").unwrap();
    let handle = opened(&dir).open_blob(&image).unwrap();
    assert!(handle.present().is_empty());
    assert_eq!(fs::metadata(blobs.join(image.blob().to_string()).join("encoded")).unwrap().len(), 0);
    assert!(blobs.join("not-ours").exists());
}

#[test]
fn objects_are_kept_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let id = |bytes: &[u8]| ObjectId::new(Sha256::digest(bytes).into());
    for bytes in [&b""[..], b"manifest", &[7; 100_000]] {
        assert_eq!(store.object(id(bytes)).unwrap(), None);
        store.put_object(id(bytes), bytes).unwrap();
        store.put_object(id(bytes), bytes).unwrap();
        assert!(store.has_object(id(bytes)));
        assert_eq!(store.object(id(bytes)).unwrap().unwrap(), bytes);
        let file = store.object_file(id(bytes)).unwrap().unwrap();
        assert_eq!((file.len(), store.object_len(id(bytes))), (bytes.len() as u64, Some(bytes.len() as u64)));
        let half = bytes.len() / 2;
        assert_eq!(file.read(half as u64, bytes.len() - half).unwrap(), &bytes[half..]);
        assert!(file.read(half as u64, bytes.len() - half + 1).is_err());
    }
    assert!(store.object_file(id(b"other")).unwrap().is_none() && store.object_len(id(b"other")).is_none());
    let wrong = store.put_object(id(b"other"), b"manifest");
    assert!(matches!(wrong, Err(StoreError::WrongObject { found, .. }) if found == id(b"manifest")));
    assert!(!store.has_object(id(b"other")));

    let path = dir.path().join("objects").join(id(b"manifest").to_string());
    for damage in [&b"manifesT"[..], b"manifes", b""] {
        fs::write(&path, damage).unwrap();
        assert!(store.object_file(id(b"manifest")).unwrap().is_none() && !path.exists());
        fs::write(&path, damage).unwrap();
        assert_eq!(store.object(id(b"manifest")).unwrap(), None);
        assert!(!path.exists());
        store.put_object(id(b"manifest"), b"manifest").unwrap();
        assert_eq!(store.object(id(b"manifest")).unwrap().unwrap(), &b"manifest"[..]);
    }
    drop(store);
    let unfinished = dir.path().join("objects/.unfinished-x");
    fs::write(&unfinished, b"half").unwrap();
    let store = opened(&dir);
    assert!(!unfinished.exists());
    assert!(store.has_object(id(b"manifest")));
}

#[test]
fn mounts_outlive_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let record = |mountpoint: &[u8], reference: &str| MountRecord {
        reference: reference.into(),
        mountpoint: OsString::from_vec(mountpoint.to_vec()).into(),
        manifest: ObjectId::new([3; 32]),
        needs: Footprint {
            blobs: vec![BlobKey { blob: BlobId::new([4; 32]), variant: 2 }],
            decoded: vec![DecodedId::new([5; 32])],
            ..Footprint::default()
        },
        settings: serde_json::json!({ "zone": "a", "threads": 4 }),
    };
    let (a, b) = (record(b"/mnt/a", "host/a:1"), record(b"/mnt/\xff", "oci:/layout"));
    {
        let store = opened(&dir);
        store.put_mount(&record(b"/mnt/a", "host/a:0")).unwrap();
        store.put_mount(&a).unwrap();
        store.put_mount(&b).unwrap();
        store.put_mount(&record(b"/mnt/gone", "host/gone")).unwrap();
        store.remove_mount(Path::new("/mnt/gone")).unwrap();
        store.remove_mount(Path::new("/never")).unwrap();
    }
    assert_eq!(opened(&dir).mounts().unwrap(), [a, b]);
}

#[test]
fn what_recorded_mounts_and_pins_need_is_held_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let images = [1, 2, 3].map(|blob| table(blob, 1, &[(0, 1)]));
    let needs = |image: usize| Footprint {
        blobs: vec![BlobKey { blob: images[image].blob(), variant: 0 }],
        ..Footprint::default()
    };
    let manifest = ObjectId::new([3; 32]);
    {
        let store = opened(&dir);
        for image in &images {
            store.open_blob(image).unwrap().write(0, &content(0, 1)).unwrap();
        }
        let (reference, mountpoint, settings) = ("host/a".to_owned(), "/mnt/a".into(), serde_json::Value::Null);
        store.put_mount(&MountRecord { reference, mountpoint, manifest, needs: needs(0), settings }).unwrap();
        let pin = PinRecord { reference: "host/b".into(), manifest, needs: needs(1), until: Some(7) };
        store.put_pin(&pin).unwrap();
        store.put_pin(&PinRecord { reference: "host/gone".into(), ..pin.clone() }).unwrap();
        store.remove_pin("host/gone").unwrap();
        assert_eq!(store.pins().unwrap(), [pin]);
        store.close().unwrap();
    }
    let store = opened(&dir);
    let evicted = store.evict_all().unwrap();
    assert_eq!((evicted.blobs, evicted.held), (1, 2));
    store.records_restored();
    assert_eq!(store.evict_all().unwrap().blobs, 2);
}

#[test]
fn usage_counts_open_and_closed_blobs_as_they_change() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let images = [table(1, 3, &[(0, 1), (1, 1), (2, 1)]), table(2, 2, &[(0, 1), (1, 1)])];
    let counted = |blobs: u64, pieces: u64| {
        let usage = store.usage().unwrap();
        let expected = (blobs, pieces, pieces * u64::from(PIECE));
        assert_eq!((usage.blobs, usage.pieces, usage.bytes), expected);
    };
    let write = |image: usize, piece: u32| {
        let handle = store.open_blob(&images[image]).unwrap();
        handle.write(piece, &content(piece, 1)).unwrap();
        counted(image as u64 + 1, u64::from(piece) + 1 + 2 * image as u64);
        handle
    };
    counted(0, 0);
    drop((write(0, 0), write(0, 1)));
    counted(1, 2);
    store.flush().unwrap();
    // Nobody has it open now: by the index, and then from memory.
    counted(1, 2);
    counted(1, 2);
    let other = write(1, 0);
    let again = store.open_blob(&images[0]).unwrap();
    again.forget(0).unwrap();
    counted(2, 2);
    drop((again, other));
    store.flush().unwrap();
    counted(2, 2);
}

#[test]
fn a_decoded_form_is_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let id = DecodedId::new([9; 32]);
    {
        let store = opened(&dir);
        let failed = store.put_decoded(id, 10, |mut file| {
            file.write_all(b"half").unwrap();
            Err(StoreError::Closed)
        });
        assert!(matches!(failed, Err(StoreError::Closed)) && store.decoded(id).is_none());
        store
            .put_decoded(id, 10, |mut file| file.write_all(b"whole").map_err(|e| StoreError::io("test", e)))
            .unwrap();
        assert_eq!(fs::read(store.decoded(id).unwrap()).unwrap(), b"whole");
        assert!(store.usage().unwrap().disk_bytes > 0);
    }
    // What a crash leaves of another.
    fs::write(dir.path().join("decoded/.unfinished-x"), b"half").unwrap();
    let store = opened(&dir);
    assert_eq!(fs::read_dir(dir.path().join("decoded")).unwrap().count(), 1);
    let held = store.hold(Footprint { decoded: vec![id], ..Footprint::default() });
    assert_eq!(store.evict(held.footprint()).unwrap(), Evicted { held: 1, ..Evicted::default() });
    let footprint = held.footprint().clone();
    drop(held);
    let evicted = store.evict(&footprint).unwrap();
    assert_eq!((evicted.decoded, store.decoded(id), store.usage().unwrap().disk_bytes), (1, None, 0));
}

#[test]
fn a_decoded_form_that_is_being_filled_counts_and_is_one_once_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let [id, other] = [9, 8].map(|n| DecodedId::new([n; 32]));
    let names = || {
        let names = fs::read_dir(dir.path().join("decoded")).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect::<Vec<_>>()
    };
    {
        let store = opened(&dir);
        let file = store.begin_filling(id, 1 << 20).unwrap();
        assert_eq!((file.metadata().unwrap().len(), store.usage().unwrap().disk_bytes), (1 << 20, 0));
        store.fill(id, 4096, || (&file).write_all(&[1; 4096])).unwrap();
        assert!(store.usage().unwrap().disk_bytes >= 4096);
        assert!(store.decoded(id).is_none() && store.filling(id).is_some());
        // Another one in its place does not change it for those that have it.
        let again = store.begin_filling(id, 4096).unwrap();
        assert_eq!((file.metadata().unwrap().len(), again.metadata().unwrap().len()), (1 << 20, 4096));
        store.fill(id, 4096, || (&again).write_all(&[2; 4096])).unwrap();
        store.finish_filling(id).unwrap();
        assert_eq!(fs::read(store.decoded(id).unwrap()).unwrap(), [2; 4096]);
        assert_eq!((store.filling(id), names().len()), (None, 1));
        store.begin_filling(other, 4096).unwrap();
        // Beside a whole one, which stays when it is given up.
        store.begin_filling(id, 4096).unwrap();
        store.give_up_filling(id).unwrap();
        assert!(store.decoded(id).is_some() && store.usage().unwrap().disk_bytes >= 4096);
    }
    let store = opened(&dir);
    assert!(store.filling(other).is_some(), "a mount may have it");
    let held = store.hold(Footprint { decoded: vec![other], ..Footprint::default() });
    store.give_up_fillings().unwrap();
    assert_eq!(names().len(), 2);
    drop(held);
    store.give_up_fillings().unwrap();
    assert_eq!(names(), [id.to_string()]);
    store.begin_filling(other, 4096).unwrap();
    let evicted = store.evict_all().unwrap();
    assert_eq!((evicted.decoded, names().len(), store.usage().unwrap().disk_bytes), (2, 0, 0));
}

#[test]
fn a_decoded_form_for_which_there_is_no_room_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let limits = StoreLimits { max_bytes: 1000, ..StoreLimits::default() };
    let store = Store::open(dir.path(), StoreOptions { limits, ..manual() }).unwrap();
    assert!(store.has_room(1000) && !store.has_room(1001));
    let refused = store.put_decoded(DecodedId::new([9; 32]), 1001, |_| Ok::<_, StoreError>(()));
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
}

#[test]
fn a_list_lies_beside_its_blob_and_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = opened(&dir);
    let blob = BlobId::new([1; 32]);
    let handle = store.open_blob(&table(1, 2, &[(0, 1), (1, 1)])).unwrap();
    assert!(handle.write(0, &content(0, 1)).unwrap());
    assert_eq!(store.lists(&blob).unwrap(), [] as [Bytes; 0]);
    handle.put_list(b"a list").unwrap();
    handle.put_list(b"another").unwrap();
    assert_eq!(store.lists(&blob).unwrap(), ["another"]);
    assert_eq!(store.lists(&BlobId::new([2; 32])).unwrap(), [] as [Bytes; 0]);
    store.flush().unwrap();
    drop((store, handle));
    let store = opened(&dir);
    assert_eq!(store.lists(&blob).unwrap(), ["another"], "it outlives the process");
    store.evict_all().unwrap();
    assert_eq!(store.lists(&blob).unwrap(), [] as [Bytes; 0]);
}

#[test]
fn what_is_on_its_way_takes_up_room_until_it_is_taken_out() {
    let dir = tempfile::tempdir().unwrap();
    let limits = StoreLimits { max_bytes: 1 << 20, ..StoreLimits::default() };
    let store = Store::open(dir.path(), StoreOptions { limits, ..manual() }).unwrap();
    let full = |store: &Store, len| matches!(store.spool(len), Err(StoreError::Full { .. }));
    assert!(full(&store, (1 << 20) + 1), "never");
    let mut spool = store.spool(800 << 10).unwrap();
    assert!(full(&store, 400 << 10), "not now");
    std::os::unix::fs::FileExt::write_all_at(spool.file(), &[7; 4096], 0).unwrap();
    assert_eq!(spool.read(10..20).unwrap()[..], [7; 10]);
    assert!(spool.read(4090..5000).is_err(), "nobody wrote that");
    spool.release(0..400 << 10);
    let second = store.spool(400 << 10).unwrap();
    assert!(full(&store, 400 << 10));
    drop((spool, second));
    assert!(!full(&store, 1 << 20));
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        names.iter().all(|name| ["blobs", "decoded", "index", "lock", "objects"].contains(&name.to_str().unwrap())),
        "{names:?}"
    );
}

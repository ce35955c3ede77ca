use std::fs;

use proptest::prelude::*;
use shoal_proto::Algorithm;

use super::*;

fn key(blob: u8, variant: u32) -> BlobKey {
    BlobKey { blob: BlobId::new([blob; 32]), variant }
}

fn piece(seed: u8, durable: bool) -> PieceRecord {
    let start = u64::from(seed) << 33;
    PieceRecord { fingerprint: Fingerprint::new([seed; 32]), encoded: start..start + 7, durable }
}

fn digest(seed: u8) -> Digest {
    Digest {
        algorithm: if seed.is_multiple_of(2) { Algorithm::Blake3 } else { Algorithm::Sha256 },
        bytes: [seed; 32],
    }
}

/// What the index must hold, in plain maps.
#[derive(Default)]
struct Model {
    variants: BTreeMap<BlobKey, VariantRecord>,
    pieces: BTreeMap<(BlobKey, u32), PieceRecord>,
    places: BTreeMap<Digest, ChunkPlace>,
    mounts: BTreeMap<Vec<u8>, Vec<u8>>,
    pins: BTreeMap<Vec<u8>, Vec<u8>>,
    layers: BTreeMap<ObjectId, Vec<u8>>,
}

impl Model {
    fn apply(&mut self, change: &Change) {
        match change.clone() {
            Change::Variant(key, record) => drop(self.variants.insert(key, record)),
            Change::DropVariant(key) => {
                self.variants.remove(&key);
                self.pieces.retain(|(of, _), _| *of != key);
            }
            Change::Piece(key, number, record) => drop(self.pieces.insert((key, number), record)),
            Change::Digest(digest, place) => drop(self.places.insert(digest, place)),
            Change::Mount(path, record) => drop(self.mounts.insert(path, record)),
            Change::DropMount(path) => drop(self.mounts.remove(&path)),
            Change::Pin(reference, record) => drop(self.pins.insert(reference, record)),
            Change::DropPin(reference) => drop(self.pins.remove(&reference)),
            Change::Layer(layer, record) => drop(self.layers.insert(layer, record)),
        }
    }

    fn assert_equals(&self, index: &RocksIndex) {
        assert_eq!(
            index.all().unwrap(),
            self.variants.iter().map(|(key, record)| (*key, *record)).collect::<Vec<_>>()
        );
        for blob in (0..3).map(|blob| BlobId::new([blob; 32])) {
            let variants = self.variants.iter().filter(|(key, _)| key.blob == blob);
            let expected = variants.map(|(key, record)| (key.variant, *record)).collect();
            assert_eq!(index.variants(&blob).unwrap(), expected);
        }
        for key in (0..3).flat_map(|blob| [0, 1, u32::MAX].map(|variant| key(blob, variant))) {
            let pieces = self.pieces.iter().filter(|((of, _), _)| *of == key);
            let expected: BTreeMap<_, _> = pieces.map(|((_, number), record)| (*number, record.clone())).collect();
            assert_eq!(index.pieces(key).unwrap(), expected);
            for number in [0, 1, u32::MAX] {
                assert_eq!(index.piece(key, number).unwrap().as_ref(), expected.get(&number));
            }
        }
        for digest in (0..4).map(digest) {
            assert_eq!(index.place(&digest).unwrap().as_ref(), self.places.get(&digest));
        }
        assert_eq!(index.mounts().unwrap(), self.mounts);
        assert_eq!(index.pins().unwrap(), self.pins);
        for layer in (0..3).map(|layer| ObjectId::new([layer; 32])) {
            assert_eq!(index.layer(layer).unwrap().as_ref(), self.layers.get(&layer));
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    // The greatest numbers are where a range scan or a range delete goes wrong first.
    let key = (0..3u8, prop_oneof![Just(0), Just(1), Just(u32::MAX)]).prop_map(|(blob, variant)| key(blob, variant));
    let number = prop_oneof![Just(0), Just(1), Just(u32::MAX)];
    let path = prop_oneof![Just(b"/a".to_vec()), Just(b"/a/b".to_vec()), Just(vec![0xff, 0xfe])];
    prop_oneof![
        (key.clone(), any::<u32>(), any::<u64>())
            .prop_map(|(key, pieces, last_use)| Change::Variant(key, VariantRecord { pieces, last_use })),
        key.clone().prop_map(Change::DropVariant),
        (key.clone(), number.clone(), any::<u8>(), any::<bool>())
            .prop_map(|(key, number, seed, durable)| Change::Piece(key, number, piece(seed, durable))),
        (0..4u8, key, number.clone(), number, any::<u8>()).prop_map(|(of, key, piece, chunk, seed)| {
            let fingerprint = Fingerprint::new([seed; 32]);
            Change::Digest(digest(of), ChunkPlace { key, piece, chunk, fingerprint })
        }),
        (path.clone(), any::<[u8; 3]>()).prop_map(|(path, record)| Change::Mount(path, record.to_vec())),
        path.clone().prop_map(Change::DropMount),
        (path.clone(), any::<[u8; 3]>()).prop_map(|(reference, record)| Change::Pin(reference, record.to_vec())),
        path.prop_map(Change::DropPin),
        (0..3u8, any::<[u8; 3]>())
            .prop_map(|(layer, record)| Change::Layer(ObjectId::new([layer; 32]), record.to_vec())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn batches_are_as_in_plain_maps_also_after_reopening(
        batches in prop::collection::vec((prop::collection::vec(change(), 0..8), any::<bool>()), 0..12),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RocksIndex::open(dir.path()).unwrap();
        let mut model = Model::default();
        for (changes, reopen) in &batches {
            index.commit(changes, Survives::Kill).unwrap();
            changes.iter().for_each(|change| model.apply(change));
            if *reopen {
                drop(index);
                index = RocksIndex::open(dir.path()).unwrap();
            }
            model.assert_equals(&index);
        }
    }
}

#[test]
fn places_in_variants_that_are_gone_are_forgotten_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let index = RocksIndex::open(dir.path()).unwrap();
    let place =
        |blob| ChunkPlace { key: key(blob, 0), piece: 1, chunk: 2, fingerprint: Fingerprint::new([blob; 32]) };
    let changes: Vec<_> = (0..9u8).map(|n| Change::Digest(digest(n), place(n % 3))).collect();
    index.commit(&changes, Survives::Kill).unwrap();
    index.forget_places(&|gone| gone == key(1, 0) || gone == key(0, 7)).unwrap();
    for n in 0..9u8 {
        assert_eq!(index.place(&digest(n)).unwrap(), (n % 3 != 1).then(|| place(n % 3)), "{n}");
    }
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(RocksIndex::open(dir.path()).unwrap());
    let put_schema = |version: u32, more: &[&str]| {
        let mut options = rocksdb::Options::default();
        options.create_missing_column_families(true);
        let families =
            [&["default", "meta", "blobs", "pieces", "digests", "mounts", "pins", "layers"][..], more].concat();
        let db = rocksdb::DB::open_cf(&options, dir.path(), families).unwrap();
        db.put_cf(db.cf_handle("meta").unwrap(), b"schema", version.to_be_bytes()).unwrap();
    };
    put_schema(SCHEMA_VERSION + 1, &["future"]);
    for _ in 0..2 {
        let found = SCHEMA_VERSION + 1;
        let outcome = RocksIndex::open(dir.path());
        assert!(matches!(outcome, Err(IndexError::NewerSchema { found: f, .. }) if f == found));
    }
    put_schema(SCHEMA_VERSION, &["future"]);
    RocksIndex::open(dir.path()).unwrap();
}

fn filled(path: &std::path::Path) {
    let index = RocksIndex::open(path).unwrap();
    for number in 0..200 {
        index.commit(&[Change::Piece(key(1, 0), number, piece(number as u8, true))], Survives::PowerCut).unwrap();
    }
}

fn files(path: &std::path::Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.is_file());
    files.sort();
    files
}

/// Whatever an index says after damage, it said before: nothing is made up. It can be used, at the latest when it is
/// opened again after a read has met the damage.
fn assert_usable_and_nothing_invented(path: &std::path::Path, what: &str) {
    let open = || RocksIndex::open(path).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let damage_met = open().pieces(key(1, 0)).is_err();
    let index = open();
    let pieces = index.pieces(key(1, 0)).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert!(!damage_met || pieces.is_empty(), "{what}");
    for (number, record) in pieces {
        assert_eq!(record, piece(number as u8, true), "{what}");
    }
    index.commit(&[Change::Piece(key(2, 0), 1, piece(9, true))], Survives::PowerCut).unwrap();
    assert_eq!(index.piece(key(2, 0), 1).unwrap(), Some(piece(9, true)), "{what}");
}

#[test]
fn any_missing_cut_or_scrambled_file_leaves_a_usable_index() {
    let whole = tempfile::tempdir().unwrap();
    filled(whole.path());
    // Once more, so that there is a table file besides the log.
    drop(RocksIndex::open(whole.path()).unwrap());
    let names: Vec<_> = files(whole.path()).iter().map(|file| file.file_name().unwrap().to_owned()).collect();
    assert!(names.iter().any(|name| name.to_string_lossy().ends_with(".sst")), "{names:?}");
    for name in names.iter().filter(|name| !name.to_string_lossy().starts_with("LOG")) {
        for damage in ["remove", "empty", "cut", "flip", "scramble"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index");
            fs::create_dir(&path).unwrap();
            for file in files(whole.path()) {
                fs::copy(&file, path.join(file.file_name().unwrap())).unwrap();
            }
            let file = path.join(name);
            let mut bytes = fs::read(&file).unwrap();
            match damage {
                "remove" => fs::remove_file(&file).unwrap(),
                "empty" => fs::write(&file, []).unwrap(),
                "cut" => fs::write(&file, &bytes[..bytes.len() / 2]).unwrap(),
                // Where a table file has its first records, which opening it does not read.
                "flip" => {
                    bytes.iter_mut().skip(40).take(1).for_each(|byte| *byte ^= 1);
                    fs::write(&file, bytes).unwrap();
                }
                _ => {
                    bytes.iter_mut().for_each(|byte| *byte ^= 0x5a);
                    fs::write(&file, bytes).unwrap();
                }
            }
            assert_usable_and_nothing_invented(&path, &format!("{damage} {}", name.to_string_lossy()));
        }
    }
}

#[test]
fn a_damaged_index_is_put_aside_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    for _ in 0..2 {
        filled(&path);
        fs::write(path.join("CURRENT"), b"MANIFEST-nonsense").unwrap();
        assert!(RocksIndex::open(&path).unwrap().pieces(key(1, 0)).unwrap().is_empty());
        assert!(dir.path().join("index.damaged/CURRENT").exists());
        fs::remove_dir_all(&path).unwrap();
    }
}

//! Blobs as registries have them: the bootstrap inside, tar headers behind the parts, a table of contents at the end.

use std::fs;
use std::path::{Path, PathBuf};

use shoal_rafs::{
    Blob, BlobDirReader, BlobTarget, BootstrapError, BuildOptions, Builder, CheckReport, Compressor, ImageFile,
    ImageFileError, Output, check_file, unpack,
};

mod support;

use support::image::{Built, build, facts};

/// An image whose bootstrap is in its blob too, and the path of that.
fn layer(source: &Path, work: &Path, options: BuildOptions) -> (Built, PathBuf) {
    let built = build(source, work, BuildOptions { inline_meta: true, ..options });
    let path = built.blobs.join(built.report.blob.unwrap().to_string());
    (built, path)
}

fn small(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    for (name, len) in [("a", 100), ("b", 0x1000), ("c", 0x3100)] {
        fs::write(source.join(name), support::noise(len as u64, len)).unwrap();
    }
    source
}

fn none() -> BuildOptions {
    BuildOptions { compressor: Compressor::None, chunk_size: 0x1000, ..BuildOptions::default() }
}

fn problems(report: &CheckReport) -> Vec<String> {
    report.problems.iter().map(|problem| format!("{}: {}", problem.place, problem.problem)).collect()
}

#[test]
fn an_image_is_read_from_the_blob_that_it_lies_in() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, (compressor, chunk_size, batch_size, toc)) in [
        (Compressor::Zstd, 0x1000, None, false),
        (Compressor::None, 0x1000, None, true),
        (Compressor::Lz4, 0x1000, Some(0x1000), true),
        (Compressor::None, 0x1_0000, Some(0x1_0000), false),
        (Compressor::Zstd, 0x1_0000, Some(0x1_0000), true),
        (Compressor::Zstd, 0x10_0000, None, true),
        (Compressor::Zstd, 0x10_0000, Some(0x10_0000), true),
    ]
    .into_iter()
    .enumerate()
    {
        let options = BuildOptions { compressor, chunk_size, batch_size, toc, ..BuildOptions::default() };
        let (built, path) = layer(&source, &dir.path().join(number.to_string()), options);
        let file = ImageFile::open(&path).unwrap();
        assert_eq!(file.own_blob(), built.report.blob);
        let image = file.parse().unwrap();
        // Both bootstraps say the same of the blob, but for one being inside.
        let described =
            Blob { features: image.blobs()[0].features & !2, mapped_block: 0, ..image.blobs()[0].clone() };
        assert_eq!(described, Blob { mapped_block: 0, ..built.image.blobs()[0].clone() });
        let reader = BlobDirReader::at(&image, &file.blob_paths(None)).unwrap();
        support::assert_same(&expected, &facts(&image, &reader));
        support::assert_same(&expected, &facts(&built.image, &built.reader));
        let report = check_file(&file, None);
        assert!(report.ok, "{options:?}: {:?}", problems(&report));
        assert_eq!(report.blobs[0].verified_chunks, report.blobs[0].named_chunks);
        let beside = check_file(&ImageFile::open(&built.boot).unwrap(), Some(&built.blobs));
        assert!(beside.ok, "{options:?}: {:?}", problems(&beside));
        let tar = unpack(&image, &reader, std::io::sink()).unwrap();
        assert_eq!(tar.bytes, report.decoded_bytes);
    }
}

/// The parts by their bytes, with nothing of the reader's code.
#[test]
fn the_parts_lie_as_converters_write_them() {
    let dir = tempfile::tempdir().unwrap();
    let (built, path) = layer(&small(dir.path()), dir.path(), BuildOptions { toc: true, ..none() });
    let bytes = fs::read(path).unwrap();
    let (mut end, mut names, mut parts) = (bytes.len(), Vec::new(), Vec::new());
    while end > 0 {
        let header = tar::Header::from_byte_slice(&bytes[end - 512..end]);
        assert_eq!((&bytes[end - 255..end - 247], bytes[end - 356]), (&b"ustar  \0"[..], b'0'));
        assert!(bytes[end - 412..end - 388].iter().all(|byte| *byte == 0), "no mode, no owner");
        assert_eq!((header.mtime().unwrap(), header.cksum().is_ok()), (0, true));
        let start = end - 512 - header.entry_size().unwrap() as usize;
        names.push(String::from_utf8(header.path_bytes().into_owned()).unwrap());
        parts.push(start..end - 512);
        end = start;
    }
    assert_eq!(names, ["rafs.blob.toc", "image.boot", "blob.digest", "blob.meta", "image.blob"]);
    let toc = &bytes[parts[0].clone()];
    let listed: Vec<_> = toc.chunks(128).map(|entry| String::from_utf8_lossy(&entry[8..24]).into_owned()).collect();
    let listed: Vec<_> = listed.iter().map(|name| name.trim_end_matches('\0')).collect();
    assert_eq!(listed, ["image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot"]);
    let word = |at: usize| u64::from_le_bytes(toc[at..at + 8].try_into().unwrap()) as usize;
    let boot = zstd::bulk::decompress(&bytes[parts[1].clone()], word(4 * 128 + 72)).unwrap();
    assert_eq!((toc[4 * 128], word(4 * 128 + 56), word(4 * 128 + 64)), (2, parts[1].start, parts[1].len()));
    let table = u64::from_le_bytes(boot[1152 + 8..1160 + 8].try_into().unwrap()) as usize;
    assert_eq!((&boot[1408..1472], &boot[table..table + 64]), (&[b'x'; 64][..], &[b'x'; 64][..]));
    assert_eq!(boot[table + 84..table + 88], 0x7000_0023u32.to_le_bytes());
    assert_eq!(boot[table + 88..table + 96], (parts[1].start as u64).to_le_bytes());
    let header = parts[3].end - 4096;
    assert_eq!(bytes[header + 4..header + 8], 0x7000_0023u32.to_le_bytes());
    assert_eq!(parts[2].len(), 32 * built.report.unique_chunks as usize);
    assert_eq!(built.image.blobs()[0].features, 0x7000_0021);
}

#[test]
fn a_layer_without_content_is_its_bootstrap() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("empty")).unwrap();
    for toc in [false, true] {
        let (built, path) = layer(&source, &dir.path().join(toc.to_string()), BuildOptions { toc, ..none() });
        let image = ImageFile::open(&path).unwrap().parse().unwrap();
        assert_eq!((image.blobs().len(), built.image.blobs().len()), (0, 0));
        support::assert_same(&support::facts(&source), &facts(&image, &built.reader));
        assert!(check_file(&ImageFile::open(&path).unwrap(), None).ok);
    }
}

#[test]
fn the_name_of_the_file_or_its_bytes_say_which_blob_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = layer(&small(dir.path()), dir.path(), BuildOptions { toc: true, ..none() });
    let id = ImageFile::open(&path).unwrap().own_blob();
    for name in ["layer.blob".to_owned(), format!("{}.blob", id.unwrap())] {
        let copy = dir.path().join(name);
        fs::copy(&path, &copy).unwrap();
        assert_eq!(ImageFile::open(&copy).unwrap().own_blob(), id);
    }
    // Outside of a blob the name means nothing.
    let file = ImageFile::open(&path).unwrap();
    let alone = ImageFile::from(file.bootstrap().clone());
    assert!(matches!(alone.parse(), Err(BootstrapError::Invalid { structure: "blob entry", .. })));
    // A blob under a name that is not its digest is found out by the check.
    let renamed = dir.path().join(format!("{:064x}", 7));
    fs::copy(&path, &renamed).unwrap();
    let report = check_file(&ImageFile::open(&renamed).unwrap(), None);
    assert!(problems(&report).iter().any(|problem| problem.contains("sha256")), "{:?}", problems(&report));
}

#[test]
fn files_without_a_bootstrap_inside_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let missing = dir.path().join("missing");
    assert!(matches!(ImageFile::open(&missing), Err(ImageFileError::Io { path, .. }) if path == missing));
    // A plain blob is taken for a bootstrap, and is none.
    let blob = built.blobs.join(built.image.blobs()[0].id.to_string());
    assert!(ImageFile::open(&blob).unwrap().parse().is_err());
    // A layer that was cut in front of its bootstrap.
    let (built, path) = layer(&dir.path().join("source"), &dir.path().join("layer"), none());
    let mut bytes = fs::read(&path).unwrap();
    let boot = fs::metadata(&built.boot).unwrap().len() as usize + 512;
    bytes.truncate(bytes.len() - boot);
    fs::write(&path, bytes).unwrap();
    assert!(matches!(ImageFile::open(&path), Err(ImageFileError::NoBootstrap { .. })));
}

/// Every byte behind the chunk data, flipped in turn: the check finds it, and nothing panics.
#[test]
fn the_check_finds_every_flipped_byte_behind_the_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let source = small(dir.path());
    for toc in [false, true] {
        let (built, path) = layer(&source, &dir.path().join(toc.to_string()), BuildOptions { toc, ..none() });
        let mut bytes = fs::read(&path).unwrap();
        let start = built.image.blobs()[0].chunk_table.offset as usize - 512;
        for position in (start..bytes.len()).step_by(7) {
            bytes[position] ^= 0x21;
            fs::write(&path, &bytes).unwrap();
            if let Ok(file) = ImageFile::open(&path) {
                let report = check_file(&file, None);
                assert!(!report.ok, "{toc} byte {position}");
            }
            bytes[position] ^= 0x21;
        }
    }
}

#[test]
fn the_check_says_which_part_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let (built, path) = layer(&small(dir.path()), dir.path(), BuildOptions { toc: true, ..none() });
    let original = fs::read(&path).unwrap();
    let with = |position: usize| {
        let mut bytes = original.clone();
        bytes[position] ^= 1;
        fs::write(&path, &bytes).unwrap();
        problems(&check_file(&ImageFile::open(&path).unwrap(), None))
    };
    let table = built.image.blobs()[0].chunk_table.offset as usize;
    let has = |problems: &[String], text: &str| problems.iter().any(|problem| problem.contains(text));
    let in_data = with(10);
    assert!(has(&in_data, "chunk 0 of blob") && has(&in_data, "image.blob in the contents"), "{in_data:?}");
    let in_table = with(table + 30);
    assert!(has(&in_table, "blob.meta in the contents") && has(&in_table, "chunk table"), "{in_table:?}");
    let table_end = table + built.image.blobs()[0].chunk_count as usize * 16;
    let in_digests = with(table_end + 4096 + 512 + 40);
    assert!(has(&in_digests, "digests in the") && has(&in_digests, "blob.digest in the"), "{in_digests:?}");
}

#[test]
fn other_blobs_need_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let error = BlobDirReader::at(&built.image, &ImageFile::open(&built.boot).unwrap().blob_paths(None)).unwrap_err();
    assert!(error.to_string().contains("no folder of blobs"), "{error}");
}

#[test]
fn a_blob_goes_to_a_file_or_a_fifo_as_into_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let source = small(dir.path());
    for toc in [false, true] {
        let options = BuildOptions { toc, inline_meta: true, ..none() };
        let (built, path) = layer(&source, &dir.path().join(format!("dir-{toc}")), options);
        let expected = fs::read(path).unwrap();
        let (file, fifo) = (dir.path().join("file"), dir.path().join(format!("fifo-{toc}")));
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        // What was there is replaced.
        fs::write(&file, b"old").unwrap();
        let reader = std::thread::spawn({
            let fifo = fifo.clone();
            move || fs::read(fifo).unwrap()
        });
        for path in [&file, &fifo] {
            let output = Output { bootstrap: None, blob: BlobTarget::File(path) };
            let report = Builder::new(options).build_to(&source, output).unwrap();
            assert_eq!((report.blob, report.encoded_bytes), (built.report.blob, expected.len() as u64));
            assert!(report.bootstrap_bytes > 0);
        }
        assert_eq!(fs::read(&file).unwrap(), expected);
        assert_eq!(reader.join().unwrap(), expected);
    }
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 6, "{names:?}");
}

#[test]
fn a_bootstrap_that_was_taken_out_is_read_with_the_chunks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let source = small(dir.path());
    let (built, path) = layer(&source, dir.path(), BuildOptions { toc: true, ..none() });
    let (boot, data) = (dir.path().join("image.boot"), dir.path().join("image.blob"));
    fs::write(&boot, ImageFile::open(&path).unwrap().bootstrap()).unwrap();
    let end = built.image.blobs()[0].data_end as usize;
    fs::write(&data, &fs::read(&path).unwrap()[..end]).unwrap();
    let error = ImageFile::open(&boot).unwrap().parse().unwrap_err();
    assert!(error.to_string().contains("not read from a blob"), "{error}");
    let file = ImageFile::open_with_blob(&boot, &data).unwrap();
    let image = file.parse().unwrap();
    let reader = BlobDirReader::at(&image, &file.blob_paths(None)).unwrap();
    support::assert_same(&support::facts(&source), &facts(&image, &reader));
    // A file that is named by a digest belongs to the blob of that name.
    let named = dir.path().join(built.report.blob.unwrap().to_string());
    fs::rename(&boot, &named).unwrap();
    let named = ImageFile::open(&named).unwrap();
    assert_eq!((named.own_blob(), named.id_in_name()), (None, built.report.blob));
    assert_eq!(named.parse().unwrap().blobs()[0].id, built.report.blob.unwrap());
    // The names of others are not touched.
    let other = dir.path().join("00".repeat(32));
    fs::copy(&built.boot, &other).unwrap();
    assert_eq!(ImageFile::open(&other).unwrap().parse().unwrap().blobs(), built.image.blobs());
    let beside = ImageFile::open_with_blob(&other, &data).unwrap();
    assert_eq!(beside.own_blob(), built.report.blob);
}

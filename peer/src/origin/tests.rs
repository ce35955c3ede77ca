//! Over real sockets: a layout server, and a double that cuts connections.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use shoal_proto::{Algorithm, ObjectId};
use shoal_rafs::{
    Bootstrap, BuildOptions, Builder, Chunk, InflateContext, Piece, PieceTable,
    oci::{Reference, Registry, RegistryError, RegistryOptions, Source, push},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::{Origin, OriginError};
use crate::layout_server::LayoutServer;
use shoal_proto::ObjectKind;

const CHUNK: u32 = 4096;

/// An image of about 100 pieces of 4 KiB, in a layout folder.
struct Image {
    dir: TempDir,
    table: Arc<PieceTable>,
    stored: Vec<u8>,
    manifest: ObjectId,
}

impl Image {
    async fn build() -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| -> PathBuf { dir.path().join(name) };
        std::fs::create_dir(path("source")).unwrap();
        let mut noise = vec![0; 100 * CHUNK as usize];
        TestRng::deterministic_rng(RngAlgorithm::ChaCha).fill_bytes(&mut noise);
        std::fs::write(path("source/noise"), noise).unwrap();
        let options = BuildOptions { chunk_size: CHUNK, ..Default::default() };
        Builder::new(options).build(&path("source"), &path("boot"), &path("blobs")).unwrap();
        let bootstrap = Bootstrap::parse(std::fs::read(path("boot")).unwrap().into()).unwrap();
        let table = Arc::new(bootstrap.piece_table(0, None).unwrap());
        let stored = std::fs::read(path("blobs").join(table.blob().to_string())).unwrap();
        let reference: Reference = format!("oci:{}:v1", path("layout").display()).parse().unwrap();
        let report =
            push(&registry(), &path("boot"), &path("blobs"), &reference, Default::default(), |_| ()).await.unwrap();
        Self { table, stored, manifest: report.manifest, dir }
    }

    async fn serve(&self) -> (LayoutServer, Source) {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = LayoutServer::start(self.dir.path().join("layout"), any).await.unwrap();
        let source = Source::new(&server.addr().to_string(), "app").unwrap();
        (server, source)
    }

    fn encoded(&self, piece: u32) -> &[u8] {
        let range = self.table.piece(piece).unwrap().encoded();
        &self.stored[range.start as usize..range.end as usize]
    }

    async fn read(&self, origin: &Origin, source: &Source, pieces: &[u32]) -> Result<Vec<(u32, Bytes)>, OriginError> {
        origin.pieces(source, &self.table, pieces).try_collect().await
    }

    fn assert_right(&self, got: &[(u32, Bytes)], wanted: &[u32]) {
        let numbers: Vec<u32> = got.iter().map(|(piece, _)| *piece).collect();
        assert_eq!(numbers, wanted);
        for (piece, bytes) in got {
            assert_eq!(bytes, self.encoded(*piece), "piece {piece}");
            self.table.decode(*piece, bytes).unwrap();
        }
    }
}

/// Pieces of a gzip layer, of which each has this range of the stored blob. What they decode to matters to nobody here.
fn overlapping(image: &Image, ranges: &[(u64, u32)]) -> PieceTable {
    let piece = |(number, &(encoded_offset, encoded_len)): (u32, &(u64, u32))| {
        let (decoded_offset, digest) = (u64::from(number) * 4096, shoal_rafs::digest(Algorithm::Sha256, b""));
        let chunk = Chunk { index: number, digest, decoded_offset, decoded_len: 1, compressed: true };
        let context = InflateContext {
            encoded_offset,
            encoded_len,
            decoded_offset,
            decoded_len: 1,
            byte: 0,
            bits: 0,
            window: Bytes::new(),
        };
        Piece::inflated(number, context, u64::from(number) << 20, vec![(chunk, 0)])
    };
    let pieces = (0..).zip(ranges).map(piece).collect();
    PieceTable::new(image.table.blob(), image.stored.len() as u64, ranges.len() as u32, pieces).unwrap()
}

#[tokio::test]
async fn pieces_that_overlap_come_with_one_request() {
    let image = Image::build().await;
    let (server, source) = image.serve().await;
    // The second ends where the first does, the third lies inside of it, the fourth behind a gap, the last at the same place.
    let ranges = [(100, 50_000), (40_000, 10_100), (45_000, 10), (60_000, 70_000), (60_000, 3)];
    let table = overlapping(&image, &ranges);
    for wanted in [&[0, 1, 2, 3, 4][..], &[0, 2], &[1, 3], &[2, 3, 4], &[3]] {
        let origin = origin();
        let got: Vec<(u32, Bytes)> = origin.pieces(&source, &table, wanted).try_collect().await.unwrap();
        assert_eq!(got.iter().map(|(piece, _)| *piece).collect::<Vec<_>>(), wanted);
        for (piece, bytes) in &got {
            let range = table.piece(*piece).unwrap().encoded();
            assert_eq!(bytes, &image.stored[range.start as usize..range.end as usize], "piece {piece} of {wanted:?}");
        }
        let ends = wanted.iter().map(|&piece| table.piece(piece).unwrap().encoded().end);
        let span = ends.max().unwrap() - table.piece(wanted[0]).unwrap().encoded().start;
        assert_eq!((origin.stats().requests, origin.stats().received_bytes), (1, span), "{wanted:?}");
    }
    server.stop().await;
}

fn registry() -> Registry {
    Registry::new(RegistryOptions { retries: 0, ..Default::default() }).unwrap()
}

fn origin() -> Origin {
    Origin::new(registry())
}

#[tokio::test]
async fn pieces_come_whole_in_order_and_with_one_request() {
    let image = Image::build().await;
    let (server, source) = image.serve().await;
    let all: Vec<u32> = (0..image.table.len()).collect();
    assert_eq!(all.len(), 100);
    let encoded = image.table.piece(99).unwrap().encoded().end;

    let whole = origin();
    image.assert_right(&image.read(&whole, &source, &all).await.unwrap(), &all);
    let stats = whole.stats();
    assert_eq!((stats.requests, stats.received_bytes), (1, encoded));
    let server_stats = server.stats();
    assert_eq!(server_stats.requests, 1);
    assert!(server_stats.sent_bytes > encoded && server_stats.sent_bytes < encoded + 1000, "{server_stats:?}");

    // Gaps are read and thrown away.
    let few = origin();
    image.assert_right(&image.read(&few, &source, &[0, 1, 3, 6]).await.unwrap(), &[0, 1, 3, 6]);
    assert_eq!((few.stats().requests, few.stats().received_bytes), (1, 7 * u64::from(CHUNK)));
    assert!(image.read(&few, &source, &[]).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_layout_folder_is_an_origin_too() {
    let image = Image::build().await;
    let source = Source::layout(&image.dir.path().join("layout")).unwrap();
    let got = image.read(&origin(), &source, &[1, 50]).await.unwrap();
    image.assert_right(&got, &[1, 50]);
}

#[tokio::test]
async fn pieces_that_the_image_does_not_name_are_refused_before_anything_is_asked() {
    let image = Image::build().await;
    let (server, source) = image.serve().await;
    let error = image.read(&origin(), &source, &[0, 100]).await.unwrap_err();
    assert!(matches!(error, OriginError::Unnamed { piece: 100, .. }), "{error}");
    assert_eq!(server.stats().requests, 0);
}

#[tokio::test]
async fn objects_are_verified_bounded_and_counted() {
    let image = Image::build().await;
    let (_server, source) = image.serve().await;
    let origin = origin();
    let get = async |id, kind, limit| origin.object(&source, id, kind, limit).await;
    let manifest = get(image.manifest, ObjectKind::Manifest, 1 << 20).await.unwrap();
    assert_eq!(get(image.manifest, ObjectKind::Blob, 1 << 20).await.unwrap(), manifest);
    assert_eq!(origin.stats().received_bytes, 2 * manifest.len() as u64);
    for kind in [ObjectKind::Manifest, ObjectKind::Blob] {
        let error = get(image.manifest, kind, 10).await.unwrap_err();
        assert!(matches!(error, OriginError::Registry(RegistryError::TooLarge { limit: 10, .. })), "{error}");
        let error = get(ObjectId::new([1; 32]), kind, 10).await.unwrap_err();
        assert!(matches!(error, OriginError::Registry(RegistryError::NotFound { .. })), "{error}");
    }
}

/// Answers ranged reads from `bytes`; sends `sends` bytes of each body, then cuts; remembers what was asked.
struct Cutter {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<std::ops::Range<usize>>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Cutter {
    async fn start(bytes: Vec<u8>, sends: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, bytes) = (asked.clone(), Arc::new(bytes));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (log, bytes) = (log.clone(), bytes.clone());
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        head.push(byte);
                    }
                    let head = String::from_utf8(head).unwrap();
                    let range = head.split("bytes=").nth(1).unwrap().lines().next().unwrap();
                    let (first, last) = range.split_once('-').unwrap();
                    let range = first.parse().unwrap()..last.parse::<usize>().unwrap() + 1;
                    log.lock().unwrap().push(range.clone());
                    let answer = format!(
                        "HTTP/1.1 206 Partial\r\ncontent-range: bytes {first}-{last}/*\r\ncontent-length: {}\r\n\r\n",
                        range.len()
                    );
                    let body = &bytes[range.start..range.end.min(range.start + sends)];
                    // A reader that has gone away is what some tests want.
                    let _ = stream.write_all(&[answer.as_bytes(), body].concat()).await;
                });
            }
        });
        Self { addr, asked, task }
    }

    fn source(&self) -> Source {
        Source::new(&self.addr.to_string(), "app").unwrap()
    }
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_broke() {
    let image = Image::build().await;
    let sends = 3 * CHUNK as usize + 100;
    let cutter = Cutter::start(image.stored.clone(), sends).await;
    let pieces: Vec<u32> = (0..10).collect();
    let origin = origin();
    image.assert_right(&image.read(&origin, &cutter.source(), &pieces).await.unwrap(), &pieces);
    let asked: Vec<_> = cutter.asked.lock().unwrap().iter().map(|range| range.start).collect();
    assert_eq!(asked, [0, sends, 2 * sends, 3 * sends]);
    assert_eq!(origin.stats().received_bytes, 10 * u64::from(CHUNK), "no byte twice");
}

#[tokio::test]
async fn a_transfer_that_brings_nothing_is_given_up() {
    let image = Image::build().await;
    let cutter = Cutter::start(image.stored.clone(), 0).await;
    let error = image.read(&origin(), &cutter.source(), &[0]).await.unwrap_err();
    assert!(matches!(&error, OriginError::Registry(error) if error.is_transient()), "{error}");
    assert_eq!(cutter.asked.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_dropped_stream_ends_its_transfer_and_nothing_else() {
    let image = Image::build().await;
    let cutter = Cutter::start(image.stored.clone(), usize::MAX >> 1).await;
    let (origin, source) = (origin(), cutter.source());
    for _ in 0..3 {
        let mut stream = Box::pin(origin.pieces(&source, &image.table, &[0, 1]));
        let (piece, bytes) = stream.next().await.unwrap().unwrap();
        assert_eq!((piece, &bytes[..]), (0, image.encoded(0)));
        drop(stream);
    }
    let reads = (0..20).map(|piece| origin.pieces(&source, &image.table, &[piece]).try_collect::<Vec<_>>());
    for (piece, got) in (0..).zip(futures::future::join_all(reads).await) {
        image.assert_right(&got.unwrap(), &[piece]);
    }
}

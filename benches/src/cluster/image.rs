//! The image that a scenario describes, made of bytes that depend on the scenario's seed alone.
//!
//! A chunk's content follows from its number and a seed: pages of noise of which a part is blank, so that it shrinks by
//! the ratio that the scenario asks for. The earlier version of an image has the same chunks but for some of them.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use shoal::command::Failure;
use shoal_rafs::{
    BuildOptions, Builder,
    oci::{PushOptions, Reference, Registry, RegistryOptions, push},
};
use shoal_sim::Scenario;

/// Chunks of a file: enough that reading one takes more than a piece, few enough for many files.
const CHUNKS_PER_FILE: u64 = 4;

/// Bytes of noise are made and blanked by the page.
const PAGE: usize = 4096;

/// An image in the layout that the registry serves.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) tag: String,
    /// The files that it was made of.
    pub(super) source: PathBuf,
    /// Relative names of the files, in the order of reading.
    pub(super) files: Vec<PathBuf>,
    /// Blobs and bootstrap layer.
    pub(super) encoded_bytes: u64,
}

/// Makes images in a folder.
#[derive(Debug)]
pub(super) struct Workshop {
    folder: PathBuf,
    layout: PathBuf,
    chunk: usize,
    chunks: u64,
    noise: usize,
    seed: u64,
    /// Part of the chunks that the earlier version shares.
    shared: f64,
}

impl Workshop {
    pub(super) fn new(scenario: &Scenario, folder: &Path) -> Result<Self, Failure> {
        let image = &scenario.image;
        let chunk = (image.piece_kib << 10) as f64 * image.decoded_ratio;
        let decoded = scenario.encoded_bytes() as f64 * image.decoded_ratio;
        Ok(Self {
            folder: folder.to_owned(),
            layout: folder.join("layout"),
            chunk: chunk as usize,
            chunks: (decoded / chunk).ceil() as u64,
            noise: (PAGE as f64 / image.decoded_ratio) as usize,
            seed: scenario.seed,
            shared: image.shares.as_ref().map_or(1.0, |shares| shares.fraction),
        })
    }

    pub(super) fn layout(&self) -> &Path {
        &self.layout
    }

    /// Decoded bytes of a chunk.
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.chunk as u64
    }

    /// The image of the scenario.
    pub(super) async fn image(&mut self) -> Result<Image, Failure> {
        let seed = self.seed;
        self.make("image", |_| seed).await
    }

    /// The version before it, which shares a part of its chunks, evenly spread.
    pub(super) async fn earlier(&mut self, tag: &str) -> Result<Image, Failure> {
        let (seed, shared) = (self.seed, self.shared);
        let other = |n: u64| (n + 1) as f64 * (1.0 - shared) >= (n as f64 * (1.0 - shared)).floor() + 1.0;
        self.make(tag, move |n| if other(n) { !seed } else { seed }).await
    }

    async fn make(&mut self, tag: &str, seed: impl Fn(u64) -> u64) -> Result<Image, Failure> {
        let source = self.folder.join(format!("{tag}-source"));
        let files = self.write_files(&source, seed)?;
        let (bootstrap, blobs) = (self.folder.join("bootstrap"), self.folder.join("blobs"));
        let options = BuildOptions { chunk_size: u32::try_from(self.chunk)?, ..BuildOptions::default() };
        Builder::new(options).build(&source, &bootstrap, &blobs)?;
        let reference: Reference = format!("oci:{}:{tag}", self.layout.display()).parse()?;
        let registry = Registry::new(RegistryOptions::default())?;
        let pushed = push(&registry, &bootstrap, &blobs, &reference, PushOptions::default(), |_| {}).await?;
        fs::remove_dir_all(&blobs)?;
        fs::remove_file(&bootstrap)?;
        Ok(Image { tag: tag.to_owned(), source, files, encoded_bytes: pushed.encoded_bytes })
    }

    fn write_files(&self, source: &Path, seed: impl Fn(u64) -> u64) -> Result<Vec<PathBuf>, Failure> {
        fs::create_dir_all(source)?;
        let mut buffer = vec![0; self.chunk];
        let mut names = Vec::new();
        for first in (0..self.chunks).step_by(CHUNKS_PER_FILE as usize) {
            let name = PathBuf::from(format!("f{:05}", first / CHUNKS_PER_FILE));
            let mut file = BufWriter::new(File::create(source.join(&name))?);
            for n in first..self.chunks.min(first + CHUNKS_PER_FILE) {
                fill(&mut buffer, self.noise, seed(n).wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
                file.write_all(&buffer)?;
            }
            file.into_inner()?.set_modified(SystemTime::UNIX_EPOCH)?;
            names.push(name);
        }
        // The image has the times of what it is made of, and shall be the same again.
        File::open(source)?.set_modified(SystemTime::UNIX_EPOCH)?;
        Ok(names)
    }
}

/// Fills every page with `noise` bytes that do not compress, and zeros.
fn fill(chunk: &mut [u8], noise: usize, seed: u64) {
    let mut state = seed.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
    for page in chunk.chunks_mut(PAGE) {
        let end = noise.min(page.len());
        let (noisy, blank) = page.split_at_mut(end);
        for bytes in noisy.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let length = bytes.len();
            bytes.copy_from_slice(&state.to_le_bytes()[..length]);
        }
        blank.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workshop(folder: &Path, shares: &str) -> Workshop {
        let text = include_str!("../../../simulations/scenarios/cluster-small.toml");
        let text = text.replace("decoded_ratio = 2.0", &format!("decoded_ratio = 2.0\n{shares}"));
        Workshop::new(&Scenario::parse(&text).unwrap(), folder).unwrap()
    }

    #[tokio::test]
    async fn the_image_has_the_size_that_the_scenario_says_and_is_the_same_again() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut sizes = Vec::new();
        for folder in &folders {
            let image = workshop(folder.path(), "").image().await.unwrap();
            sizes.push(image.encoded_bytes);
            assert_eq!(image.files.len(), 32);
        }
        assert_eq!(sizes[0], sizes[1]);
        let asked = (8 << 20) as f64;
        assert!((sizes[0] as f64 / asked - 1.0).abs() < 0.02, "{sizes:?} for {asked}");
        let read = |folder: &tempfile::TempDir| fs::read(folder.path().join("image-source/f00003")).unwrap();
        assert_eq!(read(&folders[0]), read(&folders[1]));
    }

    #[tokio::test]
    async fn the_earlier_version_shares_the_part_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut workshop = workshop(folder.path(), "shares = { with = \"v1\", fraction = 0.75 }");
        let (old, new) = (workshop.earlier("v1").await.unwrap(), workshop.image().await.unwrap());
        let (mut same, mut all) = (0, 0);
        for name in &new.files {
            let (a, b) = (fs::read(old.source.join(name)).unwrap(), fs::read(new.source.join(name)).unwrap());
            all += b.chunks(workshop.chunk).count();
            same += a.chunks(workshop.chunk).zip(b.chunks(workshop.chunk)).filter(|(a, b)| a == b).count();
        }
        assert_eq!((same, all), (96, 128));
    }
}

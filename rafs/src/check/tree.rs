//! Names, links, chunks of files: what can be counted from the tree and is stated elsewhere.

use std::collections::HashMap;

use super::CheckReport;
use crate::bootstrap::{Bootstrap, BootstrapError, Inode, Kind, Nid};

/// Counts the tree and compares the counts with what inodes and super block state.
pub(super) fn check(image: &Bootstrap, report: &mut CheckReport) -> Result<(), BootstrapError> {
    report.chunk_size = image.chunk_size();
    report.names = image.name_count();
    let mut tree = Tree { image, links: HashMap::new(), used: UsedChunks::new(image), report };
    tree.walk()?;
    tree.compare()
}

struct Tree<'a> {
    image: &'a Bootstrap,
    /// Names of everything but directories.
    links: HashMap<Nid, u32>,
    used: UsedChunks,
    report: &'a mut CheckReport,
}

impl Tree<'_> {
    fn walk(&mut self) -> Result<(), BootstrapError> {
        let mut directories = vec![self.image.inode(self.image.root())?];
        self.inode(&directories[0]);
        while let Some(directory) = directories.pop() {
            let mut expected = 2;
            for entry in directory.entries() {
                let entry = entry?;
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let inode = self.image.inode(entry.nid)?;
                if entry.kind == Kind::Directory {
                    expected += 1;
                    self.inode(&inode);
                    directories.push(inode);
                    continue;
                }
                let names = self.links.entry(entry.nid).or_default();
                *names += 1;
                if *names == 1 {
                    self.inode(&inode);
                }
            }
            self.links(&directory, expected);
        }
        Ok(())
    }

    fn compare(&mut self) -> Result<(), BootstrapError> {
        for (nid, names) in std::mem::take(&mut self.links) {
            self.links(&self.image.inode(nid)?, names);
        }
        let (image, report) = (self.image, &mut *self.report);
        let declared = image.declared();
        let place = "super block at byte 1024";
        if declared.names != report.names {
            report.problem(place, format!("it counts {} names, there are {}", declared.names, report.names));
        }
        let blocks: u64 = image.blobs().iter().map(|blob| blob.decoded_size.div_ceil(image.block_size())).sum();
        // Of tars that end within a block, upstream's builder counts whole ones.
        let whole: u64 = image.blobs().iter().map(|blob| blob.decoded_size / image.block_size()).sum();
        let stated = u64::from(declared.blocks);
        // Old builders wrote 4096, whatever there was.
        if stated != blocks && stated != 4096 && !(image.is_tarfs() && stated == whole) {
            report.problem(place, format!("it counts {} blocks, the blobs have {blocks}", declared.blocks));
        }
        if report.xattrs > 0 && !declared.has_xattrs {
            let problem = "it says that there are no xattrs, which other readers then leave out";
            report.problem("extended super block at byte 1152", problem);
        }
        for blob in 0..image.blobs().len() as u32 {
            report.unused_chunks +=
                image.chunks(blob).filter(|chunk| !self.used.contains(blob, chunk.index)).count() as u64;
        }
        Ok(())
    }

    fn links(&mut self, inode: &Inode<'_>, expected: u32) {
        if inode.nlink() != expected {
            let problem = format!("{} links, counted {expected}", inode.nlink());
            self.report.problem(format!("inode {}", inode.nid()), problem);
        }
    }

    /// An inode that is seen for the first time.
    fn inode(&mut self, inode: &Inode<'_>) {
        let counts = &mut self.report.inodes;
        match inode.kind() {
            Kind::File => counts.files += 1,
            Kind::Directory => counts.directories += 1,
            Kind::Symlink => counts.symlinks += 1,
            Kind::CharDevice | Kind::BlockDevice => counts.devices += 1,
            Kind::Fifo => counts.fifos += 1,
            Kind::Socket => counts.sockets += 1,
        }
        self.report.xattrs += inode.xattrs().count() as u64;
        if inode.kind() == Kind::File {
            self.report.decoded_bytes += inode.size();
            self.chunks(inode);
        }
    }

    fn chunks(&mut self, file: &Inode<'_>) {
        let mut consecutive = true;
        let mut expected = None;
        for chunk in file.chunks() {
            self.used.insert(chunk.id.blob, chunk.id.index);
            let place = (chunk.id.blob, chunk.decoded_offset);
            consecutive &= expected.is_none_or(|expected| expected == place);
            expected = Some((chunk.id.blob, chunk.decoded_offset + u64::from(file.chunk_size())));
        }
        // The kernel looks at the first index only.
        if file.is_one_run_for_the_kernel() && !consecutive {
            let problem = "it says that its chunks follow each other in the decoded blob, and they do not";
            self.report.problem(format!("inode {}", file.nid()), problem);
        }
    }
}

/// One bit per chunk of each blob.
struct UsedChunks(Vec<Vec<u64>>);

impl UsedChunks {
    fn new(image: &Bootstrap) -> Self {
        Self(image.blobs().iter().map(|blob| vec![0; blob.chunk_count as usize / 64 + 1]).collect())
    }

    fn insert(&mut self, blob: u32, index: u32) {
        let word = self.0.get_mut(blob as usize).and_then(|words| words.get_mut(index as usize / 64));
        if let Some(word) = word {
            *word |= 1 << (index % 64);
        }
    }

    fn contains(&self, blob: u32, index: u32) -> bool {
        let word = self.0.get(blob as usize).and_then(|words| words.get(index as usize / 64));
        word.is_some_and(|word| word & (1 << (index % 64)) != 0)
    }
}

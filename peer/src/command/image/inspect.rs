//! `shoal image inspect`.

use std::{os::unix::ffi::OsStrExt, path::PathBuf, process::ExitCode};

use shoal_rafs::{ImageFile, ImageSummary, InodeSummary, inspect, inspect_path};

use crate::command::{Failure, human_bytes, print_json};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Inspect {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Show what this path of the image leads to: a file with its chunks, a directory with its names.
    #[arg(long)]
    path: Option<PathBuf>,
    /// Print it as JSON; docs/image-json.md says what is in it.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let file = ImageFile::open(&self.bootstrap)?;
        let named = |e| format!("{}: {}", self.bootstrap.display(), crate::chain(&e));
        let image = file.parse().map_err(named)?;
        match &self.path {
            None if self.json => print_json(&inspect(&image))?,
            None => print_image(&inspect(&image)),
            Some(path) => {
                let inode = inspect_path(&image, path.as_os_str().as_bytes()).map_err(named)?;
                let inode = inode.ok_or_else(|| format!("the image has no {}", path.display()))?;
                if self.json { print_json(&inode)? } else { print_inode(&inode) }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What an image says of itself, for people.
pub(in crate::command) fn print_image(image: &ImageSummary) {
    let blocks = &image.super_blocks;
    println!("bootstrap       {}", human_bytes(image.bootstrap_bytes));
    println!("names, inodes   {}, {}", image.names, image.inodes);
    println!("chunk size      {}", human_bytes(blocks.chunk_size.into()));
    println!("compressor      {}", image.compressor);
    println!(
        "digester        {}",
        if image.chunk_digests { &image.digester } else { "none: chunks have no digests" }
    );
    println!("block size      {}", blocks.block_size);
    println!("flags           {:#x}", blocks.flags);
    println!("root            inode {}", blocks.root_nid);
    println!("meta area       from byte {}", blocks.meta_offset);
    for (name, offset, size) in [
        ("blob table", blocks.blob_table_offset, blocks.blob_table_size),
        ("chunk table", blocks.chunk_table_offset, blocks.chunk_table_size),
        ("prefetch table", blocks.prefetch_table_offset, blocks.prefetch_table_size),
    ] {
        println!("{name:<15} {size} bytes at {offset}");
    }
    for blob in &image.blobs {
        println!("blob {}", blob.id);
        let (encoded, decoded) = (human_bytes(blob.encoded_size), human_bytes(blob.decoded_size));
        println!("  {encoded} stored, {decoded} decoded, features {:#x}", blob.features);
        println!(
            "  {} chunks, {} of them named, {} and {}",
            blob.chunks, blob.named_chunks, blob.compressor, blob.digester
        );
        if blob.encrypted {
            println!("  encrypted with AES-128-XTS");
        }
        if blob.chunk_table_encoded_size > 0 {
            println!("  chunk table at {}, {} bytes", blob.chunk_table_offset, blob.chunk_table_encoded_size);
        }
    }
}

fn print_inode(inode: &InodeSummary) {
    println!("{} inode {}, {} of {} bytes", inode.path, inode.nid, inode.kind, inode.size);
    let (mode, nlink) = (inode.mode & 0o7777, inode.nlink);
    println!("mode {mode:04o}, owner {}:{}, {nlink} links", inode.uid, inode.gid);
    println!("modified {}.{:09}", inode.mtime, inode.mtime_nsec);
    inode.target.iter().for_each(|target| println!("-> {target}"));
    inode.xattrs.iter().for_each(|(name, value)| println!("{name} = 0x{value}"));
    for entry in inode.entries.iter().flatten() {
        println!("{:>10} {:<9} {}", entry.nid, entry.kind, entry.name);
    }
    for chunk in inode.chunks.iter().flatten() {
        let stored = match (chunk.encoded_offset, chunk.encoded_size) {
            (Some(offset), Some(size)) => format!("{size} bytes at {offset}"),
            _ => "in a batch".into(),
        };
        println!("{:>12} blob {} chunk {}: {stored} {}", chunk.file_offset, chunk.blob, chunk.index, chunk.digest);
    }
}

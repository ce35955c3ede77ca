//! `shoal image unpack`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use shoal_rafs::{BlobDirReader, Bootstrap};

use super::ImageFiles;
use crate::command::Failure;

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Unpack {
    #[command(flatten)]
    image: ImageFiles,
    /// Tar to write; `-` is standard output.
    #[arg(long)]
    output: PathBuf,
    /// Write a layer of an OCI image: with its whiteouts, and the root only if it was described.
    #[arg(long)]
    layer: bool,
}

impl Unpack {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (bootstrap, reader) = self.image.open()?;
        write_tar(&bootstrap, &reader, &self.output, self.layer)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Writes an image as a tar, or as that of a layer, to a file or for `-` to standard output.
pub(in crate::command) fn write_tar(
    bootstrap: &Bootstrap,
    reader: &BlobDirReader,
    output: &Path,
    layer: bool,
) -> Result<(), Failure> {
    let out: Box<dyn Write> = if output.as_os_str() == "-" {
        Box::new(std::io::stdout().lock())
    } else {
        Box::new(File::create(output).map_err(|e| format!("cannot write {}: {e}", output.display()))?)
    };
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let report = match layer {
        true => shoal_rafs::unpack_layer(bootstrap, reader, &mut out)?,
        false => shoal_rafs::unpack(bootstrap, reader, &mut out)?,
    };
    out.flush()?;
    for socket in &report.sockets {
        eprintln!("note: {socket} is a socket, which a tar cannot hold");
    }
    Ok(())
}

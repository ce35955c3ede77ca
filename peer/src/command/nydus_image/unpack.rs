//! `nydus-image unpack`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, error::ErrorKind};
use shoal_rafs::{BlobDirReader, ImageFile};

use super::refuse;
use crate::command::{Failure, image::write_tar};

#[derive(Debug, Args)]
pub(super) struct Unpack {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(required_unless_present = "file")]
    bootstrap: Option<PathBuf>,
    /// The same.
    #[arg(long = "bootstrap", short = 'B', id = "file", conflicts_with = "bootstrap")]
    file: Option<PathBuf>,
    /// The image's blob, or its chunks alone, which do unless there are batches.
    #[arg(long, short = 'b')]
    blob: Option<PathBuf>,
    /// Directory with the image's blobs.
    #[arg(long, short = 'D')]
    blob_dir: Option<PathBuf>,
    /// Tar to write, which may be a FIFO. Whiteouts are those of OCI.
    #[arg(long, short = 'o')]
    output: PathBuf,
    #[arg(long, hide = true)]
    backend_type: Option<String>,
    #[arg(long, hide = true)]
    backend_config: Option<String>,
}

impl Unpack {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        if let Some(backend) = &self.backend_type {
            let message = format!("--backend-type {backend}: blobs are read from --blob or --blob-dir alone");
            refuse(ErrorKind::InvalidValue, &message);
        }
        let path = self.file.as_deref().or(self.bootstrap.as_deref()).ok_or("no bootstrap is given")?;
        let file = match &self.blob {
            Some(blob) => ImageFile::open_with_blob(path, blob)?,
            None => ImageFile::open(path)?,
        };
        let image = file.parse()?;
        let reader = BlobDirReader::at(&image, &file.blob_paths(self.blob_dir.as_deref()))?;
        write_tar(&image, &reader, &self.output, true)?;
        Ok(ExitCode::SUCCESS)
    }
}

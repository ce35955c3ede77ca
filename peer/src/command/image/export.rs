//! `shoal image export`.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use shoal_rafs::{BlobDirReader, export_block};

use super::open_with_blobs;
use crate::command::{Failure, human_bytes};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Export {
    /// Write one flat disk image, which the kernel mounts as EROFS: `mount -t erofs FILE DIR`.
    #[arg(long, required = true)]
    block: bool,
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs. Not needed for a blob that has the bootstrap inside.
    #[arg(long)]
    blob_dir: Option<PathBuf>,
    /// File to write. It appears under this name when it is complete.
    #[arg(long)]
    output: PathBuf,
}

impl Export {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (file, bootstrap) = open_with_blobs(&self.bootstrap, self.blob_dir.as_deref())?;
        let reader = BlobDirReader::at(&bootstrap, &file.blob_paths(self.blob_dir.as_deref()))?;
        let failed = |e: std::io::Error| format!("cannot write {}: {e}", self.output.display());
        let dir = self.output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let output = tempfile::Builder::new()
            .prefix(".shoal-")
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(dir)
            .map_err(failed)?;
        let size = export_block(&bootstrap, &reader, output.as_file())?;
        output.as_file().sync_all().map_err(failed)?;
        output.persist(&self.output).map_err(|e| failed(e.error))?;
        println!("{}: {}", self.output.display(), human_bytes(size));
        Ok(ExitCode::SUCCESS)
    }
}

//! `shoal image export`.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use shoal_rafs::export_block;

use super::ImageFiles;
use crate::command::{Failure, human_bytes};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Export {
    /// Write one flat disk image, which the kernel mounts as EROFS: `mount -t erofs FILE DIR`.
    #[arg(long, required = true)]
    block: bool,
    #[command(flatten)]
    image: ImageFiles,
    /// File to write. It appears under this name when it is complete.
    #[arg(long)]
    output: PathBuf,
}

impl Export {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (bootstrap, reader) = self.image.open()?;
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

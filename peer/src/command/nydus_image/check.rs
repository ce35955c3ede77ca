//! `nydus-image check`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use shoal_rafs::{ImageFile, check_file, inspect};

use super::output::Output;
use crate::command::{
    Failure,
    image::{print_check, print_image},
};

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(required_unless_present = "file")]
    bootstrap: Option<PathBuf>,
    /// The same.
    #[arg(long = "bootstrap", short = 'B', id = "file", conflicts_with = "bootstrap")]
    file: Option<PathBuf>,
    /// Directory with the blobs; with it every chunk is verified.
    #[arg(long, short = 'D')]
    blob_dir: Option<PathBuf>,
    /// Also print what super blocks and blobs say.
    #[arg(long, short = 'v')]
    verbose: bool,
    /// JSON file to write with the blobs of the image.
    #[arg(long, short = 'J')]
    output_json: Option<PathBuf>,
}

impl Check {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let path = self.file.as_deref().or(self.bootstrap.as_deref()).ok_or("no bootstrap is given")?;
        let file = ImageFile::open(path)?;
        let report = check_file(&file, self.blob_dir.as_deref());
        print_check(&report);
        if !report.ok {
            return Ok(ExitCode::FAILURE);
        }
        let image = file.parse()?;
        if self.verbose {
            print_image(&inspect(&image));
        }
        Output::of(path, &image).write(self.output_json.as_deref())?;
        Ok(ExitCode::SUCCESS)
    }
}

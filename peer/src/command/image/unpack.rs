//! `shoal image unpack`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

use super::ImageFiles;
use crate::command::Failure;

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Unpack {
    #[command(flatten)]
    image: ImageFiles,
    /// Tar to write; `-` is standard output.
    #[arg(long)]
    output: PathBuf,
}

impl Unpack {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (bootstrap, reader) = self.image.open()?;
        let out: Box<dyn Write> = if self.output.as_os_str() == "-" {
            Box::new(std::io::stdout().lock())
        } else {
            let create = File::create(&self.output);
            Box::new(create.map_err(|e| format!("cannot write {}: {e}", self.output.display()))?)
        };
        let mut out = BufWriter::with_capacity(1 << 20, out);
        let report = shoal_rafs::unpack(&bootstrap, &reader, &mut out)?;
        out.flush()?;
        for socket in &report.sockets {
            eprintln!("note: {socket} is a socket, which a tar cannot hold");
        }
        Ok(ExitCode::SUCCESS)
    }
}

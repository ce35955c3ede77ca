//! What all verbs that speak to registries are told.

use std::path::PathBuf;

use shoal_rafs::oci::{Authfile, Location, Reference, Registry, RegistryOptions};

use crate::command::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct RegistryArgs {
    /// Speak plain HTTP to the registries. Loopback hosts are always spoken to so.
    #[arg(long)]
    plain_http: bool,
    /// A docker config.json with credentials, or with the names of credential helpers.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// A PEM file with certificate authorities to trust besides the built-in ones.
    #[arg(long, value_name = "FILE")]
    ca_file: Vec<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    pub(super) json: bool,
}

impl RegistryArgs {
    /// A client for the registries of these references. Asks the credential helpers that the auth file names.
    pub(super) fn client<'a>(
        &self,
        references: impl IntoIterator<Item = &'a Reference>,
    ) -> Result<Registry, Failure> {
        let sources = references.into_iter().map(Reference::source).filter(|source| !source.is_layout());
        let hosts: Vec<_> = sources.map(|source| source.registry().to_owned()).collect();
        let mut auth = self.authfile.as_deref().map(Authfile::load).transpose()?.unwrap_or_default();
        auth.ask_helpers(hosts.iter().map(String::as_str))?;
        Ok(Registry::new(RegistryOptions {
            plain_http: if self.plain_http { hosts } else { Vec::new() },
            ca_files: self.ca_file.clone(),
            auth,
            ..RegistryOptions::default()
        })?)
    }

    /// Ends the process when the report and an archive would both go to standard output.
    pub(super) fn refuse_two_outputs(&self, target: &Location) {
        if self.json && target.is_standard() {
            let message = "--json cannot be used while the archive goes to standard output";
            crate::command::bad_usage(clap::error::ErrorKind::ArgumentConflict, message);
        }
    }
}

//! What all verbs that speak to registries are told.

use std::path::PathBuf;

use shoal_rafs::oci::{Authfile, BackendRule, BlobPlace, Location, Reference, Registry, RegistryOptions};

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
        self.client_with(references, Vec::new())
    }

    /// The same, where blobs of images lie elsewhere.
    pub(super) fn client_with<'a>(
        &self,
        references: impl IntoIterator<Item = &'a Reference>,
        backends: Vec<BackendRule>,
    ) -> Result<Registry, Failure> {
        let sources = references.into_iter().map(Reference::source).filter(|source| !source.is_layout());
        let hosts: Vec<_> = sources.map(|source| source.registry().to_owned()).collect();
        let mut auth = self.authfile.as_deref().map(Authfile::load).transpose()?.unwrap_or_default();
        auth.ask_helpers(hosts.iter().map(String::as_str))?;
        Ok(Registry::new(RegistryOptions {
            plain_http: if self.plain_http { hosts } else { Vec::new() },
            ca_files: self.ca_file.clone(),
            auth: auth.into(),
            backends,
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

/// Where the blobs of an image lie, if not in its registry.
#[derive(Debug, clap::Args)]
pub(super) struct BackendArgs {
    /// The blobs lie here and not in the registry: `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME]`, `http[s]://HOST/PATH`
    /// or `file:///DIR`.
    #[arg(long, value_name = "PLACE")]
    pub(super) blob_backend: Option<BlobPlace>,
    /// A file such as ~/.aws/credentials with the keys of the object storage. Without it the environment is looked at:
    /// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.
    #[arg(long, value_name = "FILE", requires = "blob_backend")]
    blob_credentials: Option<PathBuf>,
}

impl BackendArgs {
    /// For the blobs of one image.
    pub(super) fn rules(&self, image: &Reference) -> Vec<BackendRule> {
        let rule = |place: &BlobPlace| BackendRule {
            place: place.clone(),
            images: vec![image.source().to_string()],
            credentials: self.blob_credentials.clone(),
        };
        self.blob_backend.iter().map(rule).collect()
    }
}

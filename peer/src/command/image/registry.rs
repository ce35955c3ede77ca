//! What all verbs that speak to registries are told.

use std::{path::PathBuf, sync::Arc};

use shoal_rafs::oci::{
    Authfile, BackendRule, BlobPlace, DecryptionKeys, Location, Recipients, Reference, Registry, RegistryOptions,
};

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
    /// A client for the registries of these references.
    pub(super) fn client<'a>(
        &self,
        references: impl IntoIterator<Item = &'a Reference>,
    ) -> Result<Registry, Failure> {
        self.client_with(references, Vec::new(), DecryptionKeys::default())
    }

    /// The same, where blobs of images lie elsewhere, and encrypted ones are read with these keys.
    pub(super) fn client_with<'a>(
        &self,
        references: impl IntoIterator<Item = &'a Reference>,
        backends: Vec<BackendRule>,
        decryption_keys: DecryptionKeys,
    ) -> Result<Registry, Failure> {
        let sources = references.into_iter().map(Reference::source).filter(|source| !source.is_layout());
        let hosts: Vec<_> = sources.map(|source| source.registry().to_owned()).collect();
        let auth = self.authfile.as_deref().map(Authfile::load).transpose()?.unwrap_or_default();
        Ok(Registry::new(RegistryOptions {
            plain_http: if self.plain_http { hosts } else { Vec::new() },
            ca_files: self.ca_file.clone(),
            auth: auth.into(),
            decryption_keys: Arc::new(decryption_keys),
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

/// What encrypted images are read with.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct DecryptionArgs {
    /// A PEM file with a private key, not encrypted itself, that opens the bootstrap layer of an encrypted image; may be given
    /// several times.
    #[arg(long, value_name = "FILE")]
    decryption_key: Vec<PathBuf>,
}

impl DecryptionArgs {
    pub(in crate::command) fn keys(&self) -> Result<DecryptionKeys, Failure> {
        Ok(DecryptionKeys::read(self.decryption_key.iter().map(PathBuf::as_path))?)
    }
}

/// Who shall be able to read what is written.
#[derive(Debug, clap::Args)]
pub(super) struct EncryptionArgs {
    /// Encrypt the bootstrap layer for whoever has the private key to this public key in a PEM file, for RSA or the curves
    /// P-256, P-384 and P-521; may be given several times. The keys of encrypted blobs are in that layer.
    #[arg(long, value_name = "jwe:FILE")]
    encryption_key: Vec<String>,
}

impl EncryptionArgs {
    pub(super) fn recipients(&self) -> Result<Option<Recipients>, Failure> {
        Ok(Recipients::read(self.encryption_key.iter().map(String::as_str))?)
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

//! What all verbs that speak to registries are told.

use std::{path::PathBuf, sync::Arc};

use shoal_rafs::oci::{
    Authfile, BackendRule, BlobPlace, DecryptionKeys, Location, Recipients, Reference, Registry, RegistryOptions,
    is_public_registry,
};

use super::authfiles;
use crate::command::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct RegistryArgs {
    /// Speak plain HTTP to this registry, HOST[:PORT]; may be given several times. Without a name: to all registries that are no
    /// public ones, by name or address. Loopback hosts are always spoken to so.
    #[arg(long, value_name = "HOST", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    plain_http: Vec<String>,
    /// A docker config.json or a podman auth.json with credentials, or with the names of credential helpers. Without it the files
    /// are read that podman and skopeo read, $REGISTRY_AUTH_FILE before all others.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// A token server, HOST[:PORT], that may see credentials although it is not under the domain of the registry that names it;
    /// may be given several times.
    #[arg(long, value_name = "HOST")]
    token_server: Vec<String>,
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
        let auth = match &self.authfile {
            Some(file) => Authfile::load(file)?,
            None => authfiles::load(|name| std::env::var_os(name))?,
        };
        Ok(Registry::new(RegistryOptions {
            plain_http: self.plain_hosts(&hosts),
            ca_files: self.ca_file.clone(),
            auth: auth.into(),
            token_servers: self.token_server.clone(),
            decryption_keys: Arc::new(decryption_keys),
            backends,
            ..RegistryOptions::default()
        })?)
    }

    /// Which of the registries are spoken to in the clear. Ends the process when the options name none of them.
    fn plain_hosts(&self, hosts: &[String]) -> Vec<String> {
        let plain = plain_hosts(&self.plain_http, hosts);
        if let (true, [first, ..]) = (plain.is_empty() && !self.plain_http.is_empty(), hosts) {
            let message = format!(
                "--plain-http is for no registry here: one with a public name must be named, as in --plain-http={first}"
            );
            crate::command::bad_usage(clap::error::ErrorKind::ValueValidation, &message);
        }
        plain
    }

    /// Ends the process when the report and an archive would both go to standard output.
    pub(super) fn refuse_two_outputs(&self, target: &Location) {
        if self.json && target.is_standard() {
            let message = "--json cannot be used while the archive goes to standard output";
            crate::command::bad_usage(clap::error::ErrorKind::ArgumentConflict, message);
        }
    }
}

/// Of the hosts those that are named, or with an empty name all that are not public.
fn plain_hosts(named: &[String], hosts: &[String]) -> Vec<String> {
    let private = named.iter().any(String::is_empty);
    let is_plain = |host: &&String| {
        (private && !is_public_registry(host)) || named.iter().any(|name| name.eq_ignore_ascii_case(host))
    };
    hosts.iter().filter(is_plain).cloned().collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_registries_are_spoken_to_in_the_clear_only_by_name() {
        let hosts = ["lan:5000", "docker.io", "10.0.0.1:5000"].map(str::to_owned);
        let plain = |named: &[&str]| {
            let named: Vec<_> = named.iter().map(|name| (*name).to_owned()).collect();
            plain_hosts(&named, &hosts)
        };
        assert_eq!(plain(&[]), [""; 0]);
        assert_eq!(plain(&[""]), ["lan:5000", "10.0.0.1:5000"]);
        assert_eq!(plain(&["LAN:5000"]), ["lan:5000"]);
        assert_eq!(plain(&["docker.io", ""]), hosts);
        assert_eq!(plain(&["other.io"]), [""; 0]);
    }
}

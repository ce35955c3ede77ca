//! Where the blobs of converted layers go: to the target, or to a place of blobs.

use std::path::Path;

use tempfile::NamedTempFile;

use super::image::Conversion;
use crate::oci::{Descriptor, Placed, RegistryError, Source, backend::Backend};

impl Conversion<'_> {
    fn backend(&self) -> Result<Option<&Backend>, RegistryError> {
        self.options.blob_backend.as_ref().map(|place| self.registry.backend_at(place)).transpose()
    }

    /// Whether a blob is where blobs go.
    pub(super) async fn has_blob(&self, blob: &Descriptor) -> Result<bool, RegistryError> {
        let size = match self.backend()? {
            Some(backend) => backend.size(&self.registry.http, blob.id).await?,
            None => self.registry.blob_size(self.to, blob.id).await?,
        };
        Ok(size == Some(blob.size))
    }

    /// Stores a file unless it is there already, which is what the answer says.
    pub(super) async fn put_blob(&self, blob: &Descriptor, file: &Path) -> Result<bool, RegistryError> {
        match self.backend()? {
            Some(backend) => backend.put(&self.registry.http, blob, file).await,
            None => self.registry.upload_blob(self.to, blob, file).await,
        }
    }

    /// Brings a blob of another image.
    pub(super) async fn bring_blob(&self, from: &Source, blob: &Descriptor) -> Result<Placed, RegistryError> {
        let Some(backend) = self.backend()? else { return self.registry.copy_blob(from, self.to, blob).await };
        if self.has_blob(blob).await? {
            return Ok(Placed::Existed);
        }
        let file = NamedTempFile::new().map_err(RegistryError::io("cannot make a file for a blob"))?;
        let reopened = file.reopen().map_err(RegistryError::io("cannot make a file for a blob"))?;
        self.registry.blob_to(from, blob, &mut tokio::fs::File::from_std(reopened)).await?;
        backend.put(&self.registry.http, blob, file.path()).await.map(|_| Placed::Sent)
    }
}

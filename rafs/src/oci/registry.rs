//! The client: one type for registries over HTTP and for layout folders.

use std::{io, ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture};
use sha2::{Digest, Sha256};
use shoal_proto::{BlobId, ObjectId};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::{
    BlobPlace, BlobStream, Descriptor, ImageManifest, Keyring, LayerSeal, Layout, Manifest, ManifestError, Placed,
    Platform, ProxyStats, Reference, RegistryError, RegistryOptions, SealError, Source,
    backend::{Backend, Backends},
    http::{Access, Body, Http, Probe},
    mirrors::Mirrors,
    open_bootstrap_layer,
    passage::Passage,
    proxy::Proxy,
};

/// Largest manifest or index, as the distribution specification recommends.
pub(super) const MAX_MANIFEST: u64 = 4 << 20;

/// An image, found: its manifest and where it came from.
#[derive(Debug, Clone)]
pub struct Image {
    /// Where its bytes live.
    pub source: Source,
    /// What the reference was resolved to: the manifest, or an index that holds it.
    pub resolved: ObjectId,
    /// The digest of the manifest.
    pub id: ObjectId,
    /// The manifest as the registry has it.
    pub bytes: Bytes,
    /// The manifest, parsed.
    pub manifest: ImageManifest,
}

/// Reads and writes images, in registries and layout folders. Cheap to clone; clones share connections and tokens.
///
/// All operations may be dropped at any time; what was being written is then not there, or whole.
#[derive(Debug, Clone)]
pub struct Registry {
    pub(super) http: Arc<Http>,
    mirrors: Option<Arc<Mirrors>>,
    proxy: Option<Arc<Proxy>>,
    backends: Arc<Backends>,
    in_background: bool,
}

impl Registry {
    /// A client. Reads the system's certificates; makes no connection.
    pub fn new(options: RegistryOptions) -> Result<Self, RegistryError> {
        let mirrors = Mirrors::new(&options)?.map(Arc::new);
        let http = Arc::new(Http::new(options)?);
        let proxy = Proxy::new(&http.options, &http)?.map(Arc::new);
        let backends = Arc::new(Backends::new(&http.options, &http)?);
        Ok(Self { http, mirrors, proxy, backends, in_background: false })
    }

    /// The same, for reads that nobody waits for: a proxy is told so.
    pub fn in_background(&self) -> Self {
        Self { in_background: true, ..self.clone() }
    }

    /// Who this client is, where: changes count for it.
    pub fn keyring(&self) -> &Keyring {
        &self.http.options.auth
    }

    /// What became of reads through the proxy, if there is one.
    pub fn proxy_stats(&self) -> Option<ProxyStats> {
        self.proxy.as_ref().map(|proxy| proxy.stats())
    }

    /// Decrypts a bootstrap layer with the keys of the options, as [`open_bootstrap_layer`] does. Blocks.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn open_layer(&self, layer: ObjectId, bytes: Bytes, seal: Option<&LayerSeal>) -> Result<Bytes, SealError> {
        open_bootstrap_layer(layer, bytes, seal, &self.http.options.decryption_keys)
    }

    /// Remembers where an image says that its blobs are. It is followed only if it is a place of the options, which is what
    /// the answer says.
    pub fn note_backend(&self, source: &Source, place: &BlobPlace) -> bool {
        let known = self.backends.note(source, place);
        if !known {
            tracing::debug!(%source, %place, "an image names a place of blobs that is not configured");
        }
        known
    }

    /// Tells that bytes of a blob, which are verified elsewhere, were wrong: the next ones come from the registry itself for a
    /// while, and not from a mirror or the proxy. Whether they could have come from there.
    pub fn distrust(&self, source: &Source) -> bool {
        let mirrors = self.mirrors.as_ref().is_some_and(|mirrors| mirrors.distrust(source.registry()));
        let proxy = self.proxy.as_ref().is_some_and(|proxy| proxy.distrust(source));
        mirrors || proxy
    }

    /// A place of the options, to write to.
    pub(super) fn backend_at(&self, place: &BlobPlace) -> Result<&Backend, RegistryError> {
        let unknown = || RegistryError::NotFound { what: format!("a rule for {place}") };
        self.backends.at(place).ok_or_else(unknown)
    }

    /// Whether blobs of an image are looked for elsewhere than in its registry.
    pub(super) fn has_backend(&self, source: &Source) -> bool {
        self.backends.of(source).is_some()
    }

    /// Asks the mirrors of a registry, then the proxy, then the registry, as far as they are asked for that: the first answer
    /// counts.
    async fn first<T>(
        &self,
        source: &Source,
        what: What,
        ask: impl for<'a> Fn(&'a Http, &'a Source) -> BoxFuture<'a, Result<T, RegistryError>> + Send + Sync,
    ) -> Result<T, RegistryError> {
        if let Some(mirrors) = self.mirrors.as_ref().filter(|_| what != What::Rest) {
            for mirror in mirrors.of(source) {
                match ask(&mirrors.http, &mirror).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => mirrors.failed(&mirror, &error),
                }
            }
        }
        let asked = |proxy: &&Arc<Proxy>| what == What::Content || (what == What::Rest && !proxy.falls_back());
        if let Some(proxy) = self.proxy.as_ref().filter(asked)
            && let Some(way) = proxy.way(source, self.in_background).await
        {
            match ask(way, source).await {
                Ok(answer) => return Ok(answer),
                Err(error) => proxy.failed(error)?,
            }
        }
        ask(&self.http, source).await
    }

    /// Looks a reference up: digest and size of its manifest or index. Costs a HEAD.
    pub async fn resolve(&self, reference: &Reference) -> Result<(ObjectId, u64), RegistryError> {
        match layout(reference.source()) {
            Some(layout) => layout.resolve(reference),
            None => {
                self.first(reference.source(), What::Tag, |http, source| {
                    let reference = reference.at(source);
                    async move { http.resolve(&reference).await }.boxed()
                })
                .await
            }
        }
    }

    /// Whether the registry would give something to whoever shows `shown` (the value of an `Authorization` header), or to
    /// nobody; this client's own credentials have no part in it. `accept` says which manifests they understand. Asked once, with
    /// no further try. Costs a HEAD, and what redirects and tokens for nobody cost. Folders have nobody to ask and are not found.
    pub async fn probe(
        &self,
        source: &Source,
        probe: &Probe,
        shown: Option<&str>,
        accept: Option<&str>,
    ) -> Result<Access, RegistryError> {
        match layout(source) {
            Some(_) => Ok(Access::Absent),
            None => self.http.probe(source, probe, shown, accept).await,
        }
    }

    /// A manifest or an index by digest, at most 4 MiB, verified.
    pub async fn manifest(&self, source: &Source, id: ObjectId) -> Result<Bytes, RegistryError> {
        match layout(source) {
            Some(layout) => layout.blob(id, None).await?.collect(MAX_MANIFEST).await,
            None => self.first(source, What::Content, move |http, source| http.manifest(source, id).boxed()).await,
        }
    }

    /// Finds the Nydus image behind a reference. Of an index it takes the Nydus manifest for this machine's platform.
    pub async fn image(&self, reference: &Reference) -> Result<Image, RegistryError> {
        let source = reference.source().clone();
        let (resolved, _) = self.resolve(reference).await?;
        let broken = |id| move |source| RegistryError::Manifest { id, source };
        let mut id = resolved;
        let mut bytes = self.manifest(&source, id).await?;
        let mut document = Manifest::parse(&bytes).map_err(broken(id))?;
        if let Manifest::Index(index) = &document {
            id = index.select(&Platform::here()).map_err(broken(id))?.id;
            bytes = self.manifest(&source, id).await?;
            document = Manifest::parse(&bytes).map_err(broken(id))?;
        }
        match document {
            Manifest::Image(manifest) => Ok(Image { source, resolved, id, bytes, manifest }),
            Manifest::Index(_) => Err(broken(id)(ManifestError::NestedIndex)),
        }
    }

    /// A whole blob in memory, at most `limit` bytes, verified.
    pub async fn blob(&self, source: &Source, id: ObjectId, limit: u64) -> Result<Bytes, RegistryError> {
        match layout(source) {
            Some(layout) => layout.blob(id, None).await?.collect(limit).await,
            None => self.first(source, What::Content, move |http, source| http.blob(source, id, limit).boxed()).await,
        }
    }

    /// Writes a whole blob to `sink`, exactly as many bytes as `descriptor` says. A broken transfer goes on where it
    /// broke. The digest is known at the end only: on an error, throw away what was written.
    pub async fn blob_to(
        &self,
        source: &Source,
        descriptor: &Descriptor,
        sink: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), RegistryError> {
        let (id, size) = (BlobId::new(*descriptor.id.as_bytes()), descriptor.size);
        let mut hasher = Sha256::new();
        let (mut at, mut fruitless, mut broken) = (0, 0, false);
        while at < size {
            let mut stream = match broken {
                true => self.rest_of_range(source, id, at..size).await?,
                false => self.blob_range(source, id, at..size).await?,
            };
            let before = at;
            let broke = loop {
                match stream.next().await {
                    Some(Ok(chunk)) => {
                        hasher.update(&chunk);
                        sink.write_all(&chunk).await.map_err(RegistryError::io("cannot write a blob"))?;
                        at += chunk.len() as u64;
                    }
                    Some(Err(error)) => break Some(error),
                    None => break None,
                }
            };
            fruitless = if at > before { 0 } else { fruitless + 1 };
            broken = true;
            match broke {
                Some(error) if fruitless > 2 || !error.is_transient() => return Err(error),
                _ => {}
            }
        }
        sink.flush().await.map_err(RegistryError::io("cannot write a blob"))?;
        let found = ObjectId::new(hasher.finalize().into());
        if found == descriptor.id {
            return Ok(());
        }
        self.distrust(source);
        let what = format!("{source}@sha256:{id}");
        Err(RegistryError::WrongDigest { what, expected: descriptor.id, found: format!("sha256:{found}") })
    }

    /// Exactly these bytes of a blob, as they come, unverified. The stream ends with an error when the connection
    /// breaks; what it has given until then is as good as the rest.
    pub async fn blob_range(
        &self,
        source: &Source,
        id: BlobId,
        range: Range<u64>,
    ) -> Result<BlobStream, RegistryError> {
        self.range(source, id, range, What::Content).await
    }

    /// What is missing of a range when a stream of it broke: neither a mirror nor the proxy breaks it again, unless there is no
    /// other way.
    pub async fn rest_of_range(
        &self,
        source: &Source,
        id: BlobId,
        rest: Range<u64>,
    ) -> Result<BlobStream, RegistryError> {
        self.range(source, id, rest, What::Rest).await
    }

    async fn range(
        &self,
        source: &Source,
        id: BlobId,
        range: Range<u64>,
        what: What,
    ) -> Result<BlobStream, RegistryError> {
        let Some(backend) = self.backends.of(source) else { return self.own_range(source, id, range, what).await };
        match backend.range(&self.http, ObjectId::new(*id.as_bytes()), range.clone()).await {
            Ok(stream) => Ok(stream),
            Err(first) => match self.own_range(source, id, range, what).await {
                // Who should have it says why it does not give it; the other one was not asked to have it.
                Err(RegistryError::NotFound { .. }) => Err(first),
                found => found,
            },
        }
    }

    /// From the registry or the folder itself.
    async fn own_range(
        &self,
        source: &Source,
        id: BlobId,
        range: Range<u64>,
        what: What,
    ) -> Result<BlobStream, RegistryError> {
        match layout(source) {
            Some(layout) => layout.blob(ObjectId::new(*id.as_bytes()), Some(range)).await,
            None => {
                self.first(source, what, move |http, source| http.blob_range(source, id, range.clone()).boxed()).await
            }
        }
    }

    /// The size of a blob, or `None` when it is not there.
    pub async fn blob_size(&self, source: &Source, id: ObjectId) -> Result<Option<u64>, RegistryError> {
        match layout(source) {
            Some(layout) => layout.blob_size(id),
            None => self.http.blob_size(source, id).await,
        }
    }

    /// Whether a blob is there. One of another size is not: whatever the registry has, it is something else. Some do not tell.
    async fn has(&self, source: &Source, blob: &Descriptor) -> Result<bool, RegistryError> {
        let found = self.blob_size(source, blob.id).await?;
        Ok(found.is_some_and(|found| found == blob.size || found == 0))
    }

    /// Stores a file as a blob unless the blob is there already, which is what the answer says. The file must not
    /// change meanwhile; its digest and size must be those of `descriptor`.
    pub async fn upload_blob(
        &self,
        source: &Source,
        descriptor: &Descriptor,
        file: &Path,
    ) -> Result<bool, RegistryError> {
        if self.has(source, descriptor).await? {
            return Ok(true);
        }
        match layout(source) {
            Some(layout) => {
                let (id, file) = (descriptor.id, file.to_owned());
                blocking(move || layout.put_blob_file(id, &file)).await?;
            }
            None => {
                let body = Body::File { path: file, from: 0, size: descriptor.size };
                self.http.upload(source, descriptor.id, body, None).await?;
            }
        }
        Ok(false)
    }

    /// Stores a blob that `from` has, unless it is there already: mounted where the registry can do that, else
    /// streamed, and verified on the way.
    pub async fn copy_blob(
        &self,
        from: &Source,
        to: &Source,
        descriptor: &Descriptor,
    ) -> Result<Placed, RegistryError> {
        let (id, size) = (descriptor.id, descriptor.size);
        if self.has(to, descriptor).await? {
            return Ok(Placed::Existed);
        }
        if let Some(layout) = layout(to) {
            let file = layout.incoming()?;
            let reopened = file.reopen().map_err(RegistryError::io("cannot write a blob"))?;
            self.blob_to(from, descriptor, &mut tokio::fs::File::from_std(reopened)).await?;
            blocking(move || layout.keep(file, id)).await?;
            return Ok(Placed::Sent);
        }
        let passage = Passage::new(id, size);
        let open = |at| {
            let (start, passage) = (passage.start(at), &passage);
            let opened = async move {
                let stream = self.blob_range(from, BlobId::new(*id.as_bytes()), start..size).await?;
                Ok(passage.through(stream, start, at))
            };
            opened.boxed()
        };
        let neighbour = (from.registry() == to.registry()).then_some(from);
        self.http.upload(to, id, Body::Remote { open: &open, from: 0, size }, neighbour).await
    }

    /// Stores bytes as a blob unless the blob is there already, which is what the answer says.
    pub async fn upload_bytes(&self, source: &Source, bytes: Bytes) -> Result<(ObjectId, bool), RegistryError> {
        let id = sha256(&bytes);
        if self.has(source, &Descriptor { id, size: bytes.len() as u64 }).await? {
            return Ok((id, true));
        }
        match layout(source) {
            Some(layout) => blocking(move || layout.put_blob(&bytes).map(drop)).await?,
            None => self.http.upload(source, id, Body::Bytes(bytes), None).await.map(drop)?,
        }
        Ok((id, false))
    }

    /// Stores a manifest or an index under the tag of `reference`, or under its digest alone when there is no tag. Every
    /// blob it names must be there.
    pub async fn put_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<ObjectId, RegistryError> {
        match layout(reference.source()) {
            Some(layout) => {
                let (tag, media_type) = (reference.tag().map(str::to_owned), media_type.to_owned());
                blocking(move || layout.put_manifest(tag.as_deref(), &media_type, &bytes)).await
            }
            None => Ok(self.http.put_manifest(reference, media_type, bytes).await?.id),
        }
    }

    /// Stores a manifest that an index will name: in a registry by its digest, in a layout as a blob like any other.
    pub(super) async fn put_child(
        &self,
        source: &Source,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<ObjectId, RegistryError> {
        match layout(source) {
            Some(_) => Ok(self.upload_bytes(source, bytes).await?.0),
            None => self.put_manifest(&Reference::new(source.clone(), None, None)?, media_type, bytes).await,
        }
    }
}

/// What somebody is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// What a tag means.
    Tag,
    /// What a digest names.
    Content,
    /// What is missing of it since the one who was asked first broke off.
    Rest,
}

pub(super) fn sha256(bytes: &[u8]) -> ObjectId {
    ObjectId::new(Sha256::digest(bytes).into())
}

/// Runs what waits for a disk or a lock where it may.
pub(super) async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    let joined = tokio::task::spawn_blocking(operation).await;
    joined.unwrap_or_else(|error| Err(RegistryError::io("cannot write a blob")(io::Error::other(error))))
}

fn layout(source: &Source) -> Option<Layout> {
    source.layout_dir().map(Layout::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Callers spawn these on a runtime of several threads.
    #[test]
    fn operations_can_move_between_threads() {
        fn sendable<T: Send>(operation: T) {
            drop(operation);
        }
        let registry = Registry::new(RegistryOptions::default()).unwrap();
        let source = Source::new("localhost:1", "a").unwrap();
        let reference = Reference::new(source.clone(), None, None).unwrap();
        let id = ObjectId::new([0; 32]);
        let descriptor = Descriptor { id, size: 1 };
        sendable(registry.resolve(&reference));
        sendable(registry.image(&reference));
        sendable(registry.blob(&source, id, 1));
        sendable(registry.blob_range(&source, BlobId::new([0; 32]), 0..1));
        sendable(registry.blob_to(&source, &descriptor, &mut Vec::new()));
        sendable(registry.upload_blob(&source, &descriptor, Path::new("a")));
        sendable(registry.upload_bytes(&source, Bytes::new()));
        sendable(registry.copy_blob(&source, &source, &descriptor));
        sendable(registry.put_manifest(&reference, "a/b", Bytes::new()));
    }
}

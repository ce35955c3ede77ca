//! Blobs in object storage that speaks the protocol of Amazon's S3.
//!
//! Requests are signed and spoken by the `object_store` crate, over this client's own HTTP library: certificates, proxies and
//! time-outs are the registry's. Buckets are named in the path, which every server understands. Large blobs are written in
//! parts, and appear when the last one is there and the digest was right. No keys from metadata services of clouds.

use std::{ops::Range, path::Path, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use object_store::{
    BackoffConfig, Error, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload,
    RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path as Key,
};
use sha2::{Digest, Sha256};
use shoal_proto::ObjectId;
use tokio::{fs::File, io::AsyncReadExt};

use super::{credentials::Keys, watched::Watched};
use crate::oci::{
    BlobStream, Descriptor, RegistryError, RegistryOptions, blob_place::Bucket, error::excerpt, http::Http,
};

/// Bytes of a part, and of the largest blob that is written at once: memory of a write. At least 5 MiB, by the protocol.
const PART: u64 = 16 << 20;
/// Most parts of a blob; larger ones have larger parts.
const MAX_PARTS: u64 = 9_000;

/// A part of a bucket.
pub(super) struct S3 {
    store: AmazonS3,
    bucket: Bucket,
    /// Whether there are keys.
    signs: bool,
    /// For an answer to what has no body, with all its tries, and for the next bytes.
    patience: (Duration, Duration),
}

impl S3 {
    pub(super) fn open(
        bucket: &Bucket,
        credentials: Option<&Path>,
        options: &RegistryOptions,
        http: &Http,
    ) -> Result<Self, RegistryError> {
        let failed = |reason: String| RegistryError::Protocol { what: bucket.name.clone(), reason };
        let keys = Keys::find(credentials).map_err(|error| failed(crate::chain(&error)))?;
        let retry = RetryConfig {
            backoff: BackoffConfig { max_backoff: options.max_wait, ..BackoffConfig::default() },
            max_retries: options.retries as usize,
            retry_timeout: options.read_timeout + options.max_wait,
        };
        let mut builder = AmazonS3Builder::new()
            .with_endpoint(bucket.endpoint.as_str().trim_end_matches('/'))
            .with_region(&bucket.region)
            .with_bucket_name(&bucket.name)
            .with_allow_http(bucket.endpoint.scheme() == "http")
            .with_virtual_hosted_style_request(false)
            .with_retry(retry)
            .with_http_connector(Watched { client: http.client(&bucket.endpoint), patience: options.read_timeout });
        let signs = keys.is_some();
        builder = match keys {
            None => builder.with_skip_signature(true),
            Some(Keys { id, secret, token }) => {
                let builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                match token {
                    Some(token) => builder.with_token(token),
                    None => builder,
                }
            }
        };
        let store = builder.build().map_err(|error| failed(cut(&error)))?;
        let patience = (options.read_timeout + options.max_wait, options.read_timeout);
        Ok(Self { store, bucket: bucket.clone(), signs, patience })
    }

    fn key(&self, id: ObjectId) -> Key {
        let (prefix, id) = (Key::from(self.bucket.prefix.as_str()), id.to_string());
        prefix.join(id)
    }

    /// What is told of a blob.
    fn what(&self, id: ObjectId) -> String {
        let host = self.bucket.endpoint.host_str().unwrap_or_default();
        let port = self.bucket.endpoint.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{host}{port}/{}/{}", self.bucket.name, self.key(id))
    }

    pub(super) async fn size(&self, id: ObjectId) -> Result<Option<u64>, RegistryError> {
        match self.answer(id, self.store.head(&self.key(id))).await {
            Ok(found) => Ok(Some(found.size)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn range(&self, id: ObjectId, range: Range<u64>) -> Result<BlobStream, RegistryError> {
        let what = self.what(id);
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let found = self.answer(id, self.store.get_opts(&self.key(id), options)).await?;
        if found.range != range {
            let found = format!("bytes {}..{}", found.range.start, found.range.end);
            return Err(RegistryError::WrongRange { what, asked: range, found });
        }
        let (after, length) = (self.patience.1, range.end - range.start);
        let state = (found.into_stream(), what.clone());
        let bytes = stream::try_unfold(state, move |(mut stream, what)| async move {
            let next = tokio::time::timeout(after, stream.next()).await;
            match next.map_err(|_| RegistryError::Timeout { what: what.clone(), after })? {
                None => Ok(None),
                Some(Ok(bytes)) => Ok(Some((bytes, (stream, what)))),
                Some(Err(error)) => Err(broke(what, &error)),
            }
        });
        Ok(BlobStream::new(bytes.boxed(), what, length))
    }

    /// Writes a file. Nothing appears unless it has the digest of `blob`.
    pub(super) async fn put(&self, blob: &Descriptor, file: &Path) -> Result<(), RegistryError> {
        let mut source = Parts::open(file, blob).await?;
        if blob.size <= PART {
            let bytes = source.next().await?;
            source.check()?;
            return self.told(blob.id, self.store.put(&self.key(blob.id), bytes.into()).await).map(drop);
        }
        let mut upload = self.answer(blob.id, self.store.put_multipart(&self.key(blob.id))).await?;
        match self.parts(blob, &mut source, &mut upload).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // What it has of the parts costs its owner until it is told that they are not wanted.
                if let Err(left) = self.answer(blob.id, upload.abort()).await {
                    tracing::warn!(error = %left, "cannot take back the parts of an upload that failed");
                }
                Err(error)
            }
        }
    }

    async fn parts(
        &self,
        blob: &Descriptor,
        source: &mut Parts,
        upload: &mut Box<dyn MultipartUpload>,
    ) -> Result<(), RegistryError> {
        loop {
            let bytes = source.next().await?;
            if bytes.is_empty() {
                break;
            }
            // As long as it moves: `watched.rs` minds that.
            self.told(blob.id, upload.put_part(PutPayload::from(bytes)).await)?;
        }
        source.check()?;
        self.answer(blob.id, upload.complete()).await.map(drop)
    }

    async fn answer<T>(
        &self,
        id: ObjectId,
        answer: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, RegistryError> {
        let after = self.patience.0;
        let answered = tokio::time::timeout(after, answer).await;
        self.told(id, answered.map_err(|_| RegistryError::Timeout { what: self.what(id), after })?)
    }

    fn told<T>(&self, id: ObjectId, answer: object_store::Result<T>) -> Result<T, RegistryError> {
        answer.map_err(|error| match error {
            Error::NotFound { .. } => RegistryError::NotFound { what: self.what(id) },
            // What a server says of a signature shows more of the request than is anybody's business.
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => RegistryError::Unauthorized {
                registry: self.bucket.endpoint.host_str().unwrap_or_default().to_owned(),
                repository: self.bucket.name.clone(),
                given: self.signs,
            },
            error => broke(self.what(id), &error),
        })
    }
}

fn broke(what: String, error: &Error) -> RegistryError {
    RegistryError::Transport { what, source: cut(error).into() }
}

fn cut(error: &Error) -> String {
    excerpt(error.to_string().as_bytes())
}

/// A file, read in parts and hashed.
struct Parts {
    file: File,
    name: String,
    part: u64,
    hasher: Sha256,
    expected: ObjectId,
}

impl Parts {
    async fn open(file: &Path, blob: &Descriptor) -> Result<Self, RegistryError> {
        let name = file.display().to_string();
        let opened = File::open(file).await.map_err(RegistryError::io(format!("cannot read {name}")))?;
        let part = PART.max(blob.size.div_ceil(MAX_PARTS));
        Ok(Self { file: opened, name, part, hasher: Sha256::new(), expected: blob.id })
    }

    /// Empty at the end.
    async fn next(&mut self) -> Result<Bytes, RegistryError> {
        let mut bytes = BytesMut::new();
        let mut part = (&mut self.file).take(self.part);
        while part.read_buf(&mut bytes).await.map_err(RegistryError::io(format!("cannot read {}", self.name)))? > 0 {}
        self.hasher.update(&bytes);
        Ok(bytes.freeze())
    }

    /// Whether what was read is what it should be.
    fn check(&self) -> Result<(), RegistryError> {
        let found = ObjectId::new(self.hasher.clone().finalize().into());
        if found == self.expected {
            return Ok(());
        }
        let (what, expected) = (self.name.clone(), self.expected);
        Err(RegistryError::WrongDigest { what, expected, found: format!("sha256:{found}") })
    }
}

impl std::fmt::Debug for S3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3").field("bucket", &self.bucket).finish_non_exhaustive()
    }
}

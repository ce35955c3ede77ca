//! One request: where to, with what.

use bytes::Bytes;
use futures::future::BoxFuture;
use reqwest::{
    Method, Url,
    header::{self, HeaderMap, HeaderValue},
};

use crate::oci::{BlobStream, RegistryError, Source};

/// One request, to be made as often as it takes.
pub(in crate::oci) struct Request<'a> {
    pub(in crate::oci) method: Method,
    pub(in crate::oci) url: Url,
    pub(in crate::oci) source: &'a Source,
    /// Whether the token must allow writing.
    pub(in crate::oci) push: bool,
    /// A repository of the same registry that the token must allow to read as well.
    pub(in crate::oci) also: Option<&'a str>,
    pub(in crate::oci) headers: HeaderMap,
    pub(in crate::oci) body: Body<'a>,
}

/// What goes with a request.
#[derive(Clone)]
pub(in crate::oci) enum Body<'a> {
    None,
    Bytes(Bytes),
    /// A file of `size` bytes, from `from` on.
    File {
        path: &'a std::path::Path,
        from: u64,
        size: u64,
    },
    /// What another place has, `size` bytes, from `from` on: opened anew for each try.
    Remote {
        open: &'a Opener<'a>,
        from: u64,
        size: u64,
    },
}

impl<'a> Body<'a> {
    /// What follows the first `from` bytes of the whole; `None` beyond its end, and where there is none.
    pub(in crate::oci) fn rest(&self, from: u64) -> Option<Body<'a>> {
        match self {
            Self::Bytes(bytes) => {
                Some(Self::Bytes(bytes.slice(usize::try_from(from).ok().filter(|at| *at <= bytes.len())?..)))
            }
            Self::File { path, size, .. } if from <= *size => Some(Self::File { path, from, size: *size }),
            Self::Remote { open, size, .. } if from <= *size => Some(Self::Remote { open: *open, from, size: *size }),
            Self::File { .. } | Self::None | Self::Remote { .. } => None,
        }
    }

    /// How many bytes it has.
    pub(in crate::oci) fn len(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { from, size, .. } | Self::Remote { from, size, .. } => size - from,
        }
    }
}

/// Opens what follows the first so many bytes.
pub(in crate::oci) type Opener<'a> = dyn Fn(u64) -> BoxFuture<'a, Result<BlobStream, RegistryError>> + Sync + 'a;

impl Request<'_> {
    /// The same with a header; a value that cannot be one is left out.
    pub(in crate::oci) fn header(mut self, name: header::HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

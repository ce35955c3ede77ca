//! The CRI's image service, for a kubelet: every call is passed on to containerd as it came, and so is every answer.
//!
//! ```text
//! kubelet ──PullImage(image, credentials)──> here ──the same──> containerd ──Prepare──> snapshotter ──reads──> registry
//!                                             └── the credentials, for reads of that repository ────────────────┘
//! ```
//!
//! Containerd downloads what it downloads with what the kubelet gives it; but a lazy image is read by this daemon, later and in
//! parts. So what a pull shows is remembered for the repository of its image (see [`Keyring`] for how long), in memory only. It is
//! never logged: the messages here have no `Debug` that would show it.
//!
//! Nothing but `PullImage` is looked into. Its message is bounded; one that cannot be read is passed on all the same.

use std::{
    convert::Infallible,
    path::Path,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use prost::Message;
use shoal_rafs::oci::{Keyring, Offer};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
    transport::{Channel, Endpoint},
};

use self::message::PullImageRequest;

mod message;

/// Largest message of a pull: an image's name, credentials, and a pod's description with its annotations.
const MAX_PULL: usize = 4 << 20;
/// In front of a message of gRPC: whether it is compressed, and its length.
const FRAME_HEADER: usize = 5;

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ImageService {
    containerd: Channel,
    keyring: Keyring,
}

impl NamedService for ImageService {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl ImageService {
    /// Passes on to who serves the CRI on `containerd`, who need not be there yet.
    ///
    /// # Errors
    /// The path cannot be one of a socket.
    pub(crate) fn new(containerd: &Path, keyring: Keyring) -> Result<Self, tonic::transport::Error> {
        let containerd = Endpoint::from_shared(format!("unix://{}", containerd.display()))?.connect_lazy();
        Ok(Self { containerd, keyring })
    }

    async fn pass(mut self, request: http::Request<Body>) -> http::Response<Body> {
        let passed = match request.uri().path().ends_with("/PullImage") {
            true => self.pull(request).await,
            false => self.forward(request).await,
        };
        passed.unwrap_or_else(Status::into_http)
    }

    /// Remembers what the pull shows for as long as it takes, and on if it succeeds.
    async fn pull(&mut self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let body = axum::body::to_bytes(axum::body::Body::new(body), MAX_PULL).await;
        let body = body.map_err(|_| Status::resource_exhausted("the message of the pull is too large"))?;
        let offer = self.offer(&body);
        let request = http::Request::from_parts(head, Body::new(axum::body::Body::from(body)));
        let response = self.forward(request).await?;
        // A unary call that fails has its status in the head: there is nothing else to be sent.
        let failed = response.headers().get("grpc-status").is_some_and(|status| status != "0");
        if let Some(offer) = offer.filter(|_| !failed && response.status().is_success()) {
            offer.keep();
        }
        Ok(response)
    }

    fn offer(&self, body: &Bytes) -> Option<Offer> {
        let compressed = *body.first()? != 0;
        let message = body.get(FRAME_HEADER..).filter(|_| !compressed)?;
        let (source, credentials) = PullImageRequest::decode(message).ok()?.shown()?;
        tracing::debug!(%source, "a pull shows credentials");
        self.keyring.offer(&source, credentials)
    }

    async fn forward(&mut self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let unavailable = |error: tonic::transport::Error| {
            Status::unavailable(format!("containerd does not answer: {}", crate::chain(&error)))
        };
        futures::future::poll_fn(|context| self.containerd.poll_ready(context)).await.map_err(unavailable)?;
        self.containerd.call(request).await.map_err(unavailable)
    }
}

impl Service<http::Request<Body>> for ImageService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { Ok(service.pass(request).await) })
    }
}

#[cfg(test)]
mod tests;

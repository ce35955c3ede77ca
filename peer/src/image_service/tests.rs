//! Between a client and a containerd that is none, over real sockets.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use shoal_rafs::oci::{Authfile, Source};
use tempfile::TempDir;
use tonic::{Code, transport::Server};
use tonic_prost::ProstCodec;

use super::{
    message::{AuthConfig, ImageSpec},
    *,
};
use crate::{grpc::UnixServer, upgrade::Inheritance};

/// What the CRI says to a pull.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Answers in containerd's place, and looks at what is known meanwhile.
#[derive(Clone)]
struct Containerd {
    keyring: Keyring,
    refuses: bool,
    /// Path of each call, its body, and whether credentials for `h.io/app` were known.
    calls: Arc<Mutex<Vec<(String, Bytes, bool)>>>,
}

impl NamedService for Containerd {
    const NAME: &'static str = ImageService::NAME;
}

impl Service<http::Request<Body>> for Containerd {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = axum::body::to_bytes(axum::body::Body::new(body), MAX_PULL).await.unwrap();
            let known = this.keyring.knows(&app());
            this.calls.lock().unwrap().push((head.uri.path().to_owned(), body, known));
            if this.refuses {
                return Ok(Status::unauthenticated("no").into_http());
            }
            let answer = PullImageResponse { image_ref: "sha256:00".into() }.encode_to_vec();
            let framed = [&[0, 0, 0, 0, answer.len() as u8][..], &answer].concat();
            let mut response = http::Response::new(Body::new(axum::body::Body::from(framed)));
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            response.headers_mut().insert("grpc-status", "0".parse().unwrap());
            Ok(response)
        })
    }
}

fn app() -> Source {
    Source::new("h.io", "app").unwrap()
}

struct Bed {
    folder: TempDir,
    keyring: Keyring,
    calls: Arc<Mutex<Vec<(String, Bytes, bool)>>>,
    servers: Vec<UnixServer>,
}

impl Bed {
    async fn start(refuses: bool) -> Self {
        let keyring = Keyring::new(Authfile::default(), std::time::Duration::from_secs(3600));
        let (folder, calls) = (TempDir::new().unwrap(), Arc::default());
        let mut bed = Self { folder, keyring: keyring.clone(), calls, servers: Vec::new() };
        let containerd = Containerd { keyring: keyring.clone(), refuses, calls: bed.calls.clone() };
        let containerd = Server::builder().add_service(containerd);
        bed.servers
            .push(UnixServer::start(&bed.socket("containerd"), containerd, &Inheritance::default()).await.unwrap());
        let service = ImageService::new(&bed.socket("containerd"), keyring).unwrap();
        bed.servers.push(
            UnixServer::start(&bed.socket("own"), Server::builder().add_service(service), &Inheritance::default())
                .await
                .unwrap(),
        );
        bed
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn call(&self, method: &'static str, message: PullImageRequest) -> Result<PullImageResponse, Status> {
        let channel = crate::grpc::connect("daemon", &self.socket("own")).await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let codec = ProstCodec::<PullImageRequest, PullImageResponse>::default();
        let path = http::uri::PathAndQuery::from_static(method);
        client.unary(tonic::Request::new(message), path, codec).await.map(tonic::Response::into_inner)
    }
}

fn pull() -> PullImageRequest {
    let auth = AuthConfig { username: "user".into(), password: "word".into(), ..AuthConfig::default() };
    PullImageRequest { image: Some(ImageSpec { image: "h.io/app:1".into() }), auth: Some(auth) }
}

#[tokio::test]
async fn what_a_pull_shows_is_known_meanwhile_and_kept_if_it_succeeds() {
    for refuses in [false, true] {
        let bed = Bed::start(refuses).await;
        let answer = bed.call("/runtime.v1.ImageService/PullImage", pull()).await;
        match refuses {
            false => assert_eq!(answer.unwrap().image_ref, "sha256:00"),
            true => assert_eq!(answer.unwrap_err().code(), Code::Unauthenticated),
        }
        let calls = bed.calls.lock().unwrap().clone();
        let [(path, body, known)] = &calls[..] else { panic!("{} calls", calls.len()) };
        assert_eq!(path, "/runtime.v1.ImageService/PullImage");
        assert_eq!(PullImageRequest::decode(&body[FRAME_HEADER..]).unwrap(), pull(), "as it came");
        assert!(known);
        assert_eq!(bed.keyring.knows(&app()), !refuses);
    }
}

#[tokio::test]
async fn other_calls_are_passed_on_and_not_looked_into() {
    let bed = Bed::start(false).await;
    bed.call("/runtime.v1.ImageService/ImageStatus", pull()).await.unwrap();
    bed.call("/runtime.v1.ImageService/SomethingNew", pull()).await.unwrap();
    let nothing = PullImageRequest { auth: None, ..pull() };
    bed.call("/runtime.v1.ImageService/PullImage", nothing).await.unwrap();
    let calls = bed.calls.lock().unwrap().clone();
    assert_eq!(calls.len(), 3);
    assert!(calls.iter().all(|(.., known)| !known) && !bed.keyring.knows(&app()));
}

#[tokio::test]
async fn a_containerd_that_is_away_is_said_to_be() {
    let mut bed = Bed::start(false).await;
    bed.servers.remove(0).stop().await;
    let error = bed.call("/runtime.v1.ImageService/PullImage", pull()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(!bed.keyring.knows(&app()));
}

//! A private image is pulled as a kubelet does it: the pod's credentials go through the daemon to containerd, and open the
//! registry to the daemon, too, which has none of its own.

use std::fs;

use crate::{
    bed::{Bed, call},
    cri::{self, ImageSpec, PullImageResponse},
    image::{DATA_BYTES, Layers},
    registry_server::{PASSWORD, RegistryServer, USER},
    support::{drop_caches, shoal},
};

/// `runtime.v1.PullImageRequest` with credentials.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
}

/// Any message of the CRI, of which nothing is looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct Anything {}

fn pull(bed: &Bed, image: &str, password: Option<&str>) -> Result<PullImageResponse, tonic::Status> {
    let auth = password.map(|password| AuthConfig { username: USER.into(), password: password.into() });
    let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }), auth };
    call(&bed.snapshotter(), "/runtime.v1.ImageService/PullImage", request)
}

#[test]
fn the_credentials_of_a_pull_open_its_repository_and_nothing_else() {
    let settings = ["SHOAL_LOG=trace".to_owned(), "read.ahead_bytes=0".to_owned()];
    let Some(bed) = Bed::start_with("pull credentials", &settings) else { return };
    let Some(server) = RegistryServer::start("pull credentials", Some((USER, PASSWORD))) else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    let folder = tempfile::tempdir().expect("a folder");
    let authfile = folder.path().join("auth.json");
    let text = format!(r#"{{"auths": {{"{}": {{"username": "{USER}", "password": "{PASSWORD}"}}}}}}"#, server.host);
    fs::write(&authfile, text).expect("a file");
    let from = format!("oci:{}:1", bed.registry.layout().display());
    let [image, other] = ["team/app", "team/other"].map(|name| format!("{}/{name}:1", server.host));
    for to in [&image, &other] {
        shoal(&["image", "copy", &from, to, "--authfile"], &[&authfile]);
    }

    // Whatever else a kubelet asks is containerd's to answer.
    call::<_, Anything>(&bed.snapshotter(), "/runtime.v1.ImageService/ListImages", Anything {}).expect("a list");
    call::<_, Anything>(&bed.snapshotter(), "/runtime.v1.ImageService/ImageFsInfo", Anything {}).expect("figures");
    for password in [None, Some("guess")] {
        assert!(pull(&bed, &image, password).is_err(), "{password:?}");
        assert_eq!(bed.mounts().len(), 0);
    }
    let before = server.sent_bytes();
    let pulled = pull(&bed, &image, Some(PASSWORD)).unwrap_or_else(|error| panic!("{error}\n{}", bed.daemon.log()));
    assert!(pulled.image_ref.starts_with("sha256:"));
    assert_eq!(bed.mounts().len(), 1);
    let sent = server.sent_bytes() - before;
    assert!(sent < DATA_BYTES as u64 / 2, "a lazy pull: {sent} bytes were sent");

    // Somebody else's wrong ones do not take the place of the right ones.
    assert!(pull(&bed, &image, Some("guess")).is_err());
    drop_caches();
    let before = server.sent_bytes();
    let run = |image: &str, id: &str| cri::run(&bed, image, id, "sha256sum /data");
    assert_eq!(run(&image, "lazy"), Layers::data_digest());
    assert!(server.sent_bytes() - before > DATA_BYTES as u64 / 2, "what was read came from the registry");

    // They are for the repository of the pulled image.
    let refused = bed.daemon.try_ctl(&["mount", &other, folder.path().to_str().expect("UTF-8")]);
    assert!(!refused.status.success());
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("refused the credentials"), "{refused}");
    // In no log, at the most talkative level.
    let log = bed.daemon.log();
    assert!(log.contains("TRACE") && log.contains("a pull shows credentials"));
    for told in ["dXNlcjpzZWNyZXQ", "dXNlcjpndWVzcw", &format!("\"{PASSWORD}\"")] {
        assert_eq!(log.lines().find(|line| line.contains(told)), None, "{told}");
    }
}

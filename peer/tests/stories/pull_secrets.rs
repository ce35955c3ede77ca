//! Pull secrets of a Kubernetes cluster open private registries to the node, as long as they are there. What they hold is in no
//! log, at the most talkative level.

use sha2::{Digest, Sha256};

#[path = "../../src/pull_secrets/tests/api_double.rs"]
#[allow(dead_code, reason = "shared with the unit tests, which break it in more ways")]
mod api_double;

use self::api_double::ApiDouble;
use crate::{
    credentials::registry_double::{Auth, RegistryDouble},
    support::{Built, Daemon, assert_same, can_mount, metric, shoal, tree, wait},
};

const USER: &str = "user";
const PASSWORD: &str = "correct horse";
/// Base64 of `user:` and that.
const ENCODED: &str = "dXNlcjpjb3JyZWN0IGhvcnNl";
const BASIC: &str = "Basic dXNlcjpjb3JyZWN0IGhvcnNl";
const TOKEN: &str = "token-of-the-service-account";

#[test]
fn a_private_image_is_mounted_with_a_pull_secret() {
    if !can_mount("pull secrets") {
        return;
    }
    let source = tree(73, 12, 30_000);
    let built = Built::new(source.path(), "zstd");
    let folder = tempfile::tempdir().expect("a folder");
    let registry = RegistryDouble::start(Auth::Basic(BASIC), |bytes| hex::encode(Sha256::digest(bytes)));
    let authfile = folder.path().join("auth.json");
    let entry = format!(r#"{{"auths": {{"{}": {{"auth": "{ENCODED}=="}}}}}}"#, registry.host());
    std::fs::write(&authfile, entry.replace("==", "")).expect("a file");
    let image = format!("{}/team/app:1", registry.host());
    let (bootstrap, blobs) = (built.bootstrap(), built.blobs());
    shoal(
        &["image", "push", "--bootstrap"],
        &[&bootstrap, "--blob-dir".as_ref(), &blobs, "--authfile".as_ref(), &authfile, image.as_ref()],
    );

    let api = ApiDouble::start(TOKEN);
    let kubeconfig = api.kubeconfig(folder.path());
    api.put("team/other", "other.example", USER, PASSWORD);
    let settings = [format!("pull_secrets.kubeconfig={kubeconfig:?}"), "SHOAL_LOG=trace".to_owned()];
    let mut node = Daemon::start("node", folder.path(), &settings);
    wait("the secrets are known", || metric(&node, "shoal_pull_secrets") == 1.0);
    assert!(!node.try_mount(&image).status.success(), "the secret is for another registry: {}", node.log());
    // Of another path of that registry, so it is not shown.
    api.put("team/path", &format!("{}/teams", registry.host()), USER, PASSWORD);
    wait("the secrets are known", || metric(&node, "shoal_pull_secrets") == 2.0);
    assert!(!node.try_mount(&image).status.success());
    api.put_legacy("team/right", &format!("https://{}/team", registry.host()), USER, PASSWORD);
    wait("the secret is used", || node.try_mount(&image).status.success());
    assert_same(source.path(), &node.mountpoint());
    node.umount(&node.mountpoint());

    api.remove("team/right");
    wait("the secret is gone", || metric(&node, "shoal_pull_secrets") == 2.0);
    let other = format!("{}/team/app:2", registry.host());
    assert!(!node.try_mount(&other).status.success());
    node.stop();
    let log = node.log();
    assert!(log.contains("TRACE"), "it does not say enough to show anything");
    for secret in [PASSWORD, ENCODED, TOKEN] {
        assert_eq!(log.lines().find(|line| line.contains(secret)), None, "{secret}");
    }
}

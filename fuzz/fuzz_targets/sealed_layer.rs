//! Unwraps the key of an encrypted bootstrap layer, as its manifest has it. The layer's bytes are not those that were encrypted,
//! so that nothing may ever open.
#![no_main]

use std::sync::OnceLock;

use base64::{Engine, engine::general_purpose::STANDARD};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use shoal_rafs::oci::{BOOTSTRAP_MARK, DecryptionKeys, Manifest, SealError};

/// Of nobody: what `seeds/sealed_layer` was encrypted for.
const KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg8WZSOYg3mQPg1xfV
SOlqMFb+QF2y/u3WcDtXSfSciZ+hRANCAATM35T/25ZfEleDbhTkQvAPiXtzd2Uf
m/nnibI2TZgLtNiComu73oOaqXsQxFTQBpypu9V6aHbXrlEOBtdkV/Bx
-----END PRIVATE KEY-----
";
const PUBLIC: &str = r#"{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"","cipheroptions":{}}"#;
const DIGEST: &str = "sha256:7fac74e449e89d30b71692a626446557538c4eda97451c5922dba7314cfb81e1";

fn keys() -> &'static DecryptionKeys {
    static KEYS: OnceLock<DecryptionKeys> = OnceLock::new();
    KEYS.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory for the key");
        let path = dir.path().join("key.pem");
        std::fs::write(&path, KEY).expect("the key");
        DecryptionKeys::read([path.as_path()]).expect("a private key")
    })
}

fuzz_target!(|data: &[u8]| {
    let blob = |media_type: &str| json!({ "mediaType": media_type, "digest": DIGEST, "size": 1 });
    let mut layer = blob("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
    layer["annotations"] = json!({
        BOOTSTRAP_MARK: "true",
        "org.opencontainers.image.enc.keys.jwe": STANDARD.encode(data),
        "org.opencontainers.image.enc.pubopts": STANDARD.encode(PUBLIC),
    });
    let config = blob("application/vnd.oci.image.config.v1+json");
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] }).to_string();
    let Ok(Manifest::Image(image)) = Manifest::parse(manifest.as_bytes()) else { panic!("{manifest}") };
    let seal = image.seal.expect("an encrypted layer");
    let opened = seal.open(image.bootstrap.id, &mut [0; 64], keys());
    assert!(matches!(opened, Err(SealError::OtherKeys { .. } | SealError::Malformed { .. })), "{opened:?}");
});

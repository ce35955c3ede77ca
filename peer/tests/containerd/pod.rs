//! A pod, as a kubelet runs one over the CRI: a sandbox, which has the machine's network, and containers in it.

use prost::Message;

use crate::{
    bed::{Bed, call},
    cri::{self, ImageSpec},
    image::Layers,
    support::{Registry, wait},
};

/// Of namespaces that are the machine's: `runtime.v1.NamespaceMode`.
const NODE: i32 = 2;

/// A message of the CRI, `runtime.v1`, as far as it is used.
macro_rules! message {
    ($name:ident { $($(#[$kind:meta])+ $field:ident: $of:ty,)* }) => {
        #[derive(Clone, PartialEq, Message)]
        struct $name { $($(#[$kind])+ $field: $of,)* }
    };
}

message!(NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
});
message!(LinuxSandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
});
message!(LinuxPodSandboxConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxSandboxSecurityContext>,
});
message!(PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
});
message!(PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
});
message!(RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
});
message!(ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
});
message!(ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
});
message!(CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
});
message!(ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
});
message!(ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
});
message!(ImageStatusRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
});
message!(ImageStatusResponse {
    #[prost(message, optional, tag = "1")]
    image: Option<Nothing>,
});
// A request or an answer with one id in it.
message!(Id {
    #[prost(string, tag = "1")]
    id: String,
});
message!(Nothing {});

/// A pod that runs. Dropping it takes it away.
pub(crate) struct Pod<'a> {
    bed: &'a Bed,
    id: String,
    config: PodSandboxConfig,
}

impl<'a> Pod<'a> {
    /// Starts a sandbox without containers. What runs in it is a small image of its own.
    pub(crate) fn start(bed: &'a Bed, name: &str) -> Self {
        let mut registry = Registry::start();
        shoal_rafs::oci::Layout::new(registry.layout()).create().expect("a layout");
        Layers::new().push_ordinary(&registry.layout(), "sandbox");
        registry.switch_on();
        let image = registry.reference("sandbox");
        cri::pull(bed, &image);
        bed.ctr(&["-n", "k8s.io", "images", "tag", &image, shoal::processes::SANDBOX_IMAGE]);
        wait("containerd knows the sandbox's image", || {
            let image = Some(ImageSpec { image: shoal::processes::SANDBOX_IMAGE.into() });
            let asked = call(&bed.socket(), "/runtime.v1.ImageService/ImageStatus", ImageStatusRequest { image });
            asked.is_ok_and(|ImageStatusResponse { image }| image.is_some())
        });

        let own = format!("{name}-{}", std::process::id());
        let metadata = PodSandboxMetadata { name: own.clone(), uid: own.clone(), namespace: "default".into() };
        let options = NamespaceOption { network: NODE };
        let security_context = Some(LinuxSandboxSecurityContext { namespace_options: Some(options) });
        let linux = LinuxPodSandboxConfig { security_context };
        let config = PodSandboxConfig { metadata: Some(metadata), linux: Some(linux) };
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let Id { id } = runtime(bed, "/runtime.v1.RuntimeService/RunPodSandbox", request);
        Self { bed, id, config }
    }

    /// Starts a container of an image that was pulled, which waits; gives its id.
    pub(crate) fn container(&self, name: &str, image: &str) -> String {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into() }),
            image: Some(ImageSpec { image: image.into() }),
            command: ["/bin/sleep", "600"].map(str::to_owned).into(),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let made: Id = runtime(self.bed, "/runtime.v1.RuntimeService/CreateContainer", request);
        let Nothing {} = runtime(self.bed, "/runtime.v1.RuntimeService/StartContainer", made.clone());
        made.id
    }

    /// What a shell command prints in a container; it must succeed.
    pub(crate) fn exec(&self, container: &str, script: &str) -> String {
        let cmd = ["/bin/sh", "-c", script].map(str::to_owned).into();
        let request = ExecSyncRequest { container_id: container.into(), cmd };
        let ran: ExecSyncResponse = runtime(self.bed, "/runtime.v1.RuntimeService/ExecSync", request);
        assert_eq!(ran.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).expect("text")
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        for method in ["/runtime.v1.RuntimeService/StopPodSandbox", "/runtime.v1.RuntimeService/RemovePodSandbox"] {
            let done = call::<_, Nothing>(&self.bed.socket(), method, Id { id: self.id.clone() });
            if let Err(status) = done {
                eprintln!("{method}: {status}");
            }
        }
    }
}

fn runtime<Q: Message + 'static, A: Message + Default + 'static>(bed: &Bed, method: &'static str, message: Q) -> A {
    call(&bed.socket(), method, message).unwrap_or_else(|status| panic!("{method}: {status}"))
}

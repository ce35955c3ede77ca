//! A folder to convert in, from layout to layout.

use super::*;
use crate::oci::{ConvertError, ConvertOptions, ConvertReport, RegistryError, check_image, convert};

/// A folder with a source image and room for targets.
pub(super) struct Bed {
    pub(super) dir: TempDir,
    pub(super) registry: Registry,
}

impl Bed {
    pub(super) fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), registry: client() }
    }

    pub(super) fn reference(&self, layout: &str, tag: &str) -> Reference {
        format!("oci:{}/{layout}:{tag}", self.dir.path().display()).parse().unwrap()
    }

    pub(super) fn source(&self) -> Reference {
        self.reference("source", "v1")
    }

    pub(super) fn options(&self) -> ConvertOptions {
        let build = BuildOptions { chunk_size: 0x1_0000, ..Default::default() };
        ConvertOptions { build, state: Some(self.dir.path().join("state")), ..Default::default() }
    }

    pub(super) async fn convert(
        &self,
        to: &Reference,
        options: &ConvertOptions,
    ) -> Result<ConvertReport, ConvertError> {
        convert(&self.registry, &self.source(), to, options, |_| {}).await
    }

    /// The image must be sound, and its tree that of the source.
    pub(super) async fn is_right(&self, reference: &Reference) {
        let report = check_image(&self.registry, reference, Some(&self.source()), &[]).await.unwrap();
        assert!(report.ok, "{report:#?}");
        for image in &report.images {
            assert!(image.compared.is_some_and(|compared| compared.names > 10 && compared.files > 3), "{image:#?}");
        }
    }

    pub(super) async fn nothing_is_under(&self, reference: &Reference) {
        let resolved = self.registry.resolve(reference).await;
        let nothing = matches!(resolved, Err(RegistryError::NotFound { .. } | RegistryError::Layout { .. }));
        assert!(nothing, "{resolved:?}");
    }
}

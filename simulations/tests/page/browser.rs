//! Debian's `chromium` without a window: what it makes of a page, in figures and as a picture.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::picture::Picture;

/// Appended to a copy of the page: writes down how it is laid out.
const MEASURE: &str = include_str!("measure.html");

/// A browser that has never been used.
pub(crate) struct Browser {
    folder: TempDir,
    window: (u32, u32),
}

impl Browser {
    /// With a window of a size. `None`, and a line saying so, where it is not installed.
    pub(crate) fn find(test: &str, window: (u32, u32)) -> Option<Self> {
        let found = Command::new("chromium").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            println!("skipped: {test} (needs chromium)");
            return None;
        }
        Some(Self { folder: tempfile::tempdir().unwrap(), window })
    }

    /// Where a page can be put.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a page looks like, in figures.
    pub(crate) fn measure(&self, page: &str) -> Value {
        let path = self.path("measured.html");
        std::fs::write(&path, page.replacen("</body>", &format!("{MEASURE}</body>"), 1)).unwrap();
        let output = self.run(&["--dump-dom"], &path);
        let document = String::from_utf8(output.stdout).unwrap();
        let found = document
            .rsplit_once("<script type=\"application/json\">")
            .and_then(|(_, rest)| rest.split_once("</script>"));
        serde_json::from_str(found.unwrap_or_else(|| panic!("nothing was measured: {document}")).0).unwrap()
    }

    /// What a page looks like.
    pub(crate) fn picture(&self, page: &str) -> Picture {
        let (path, picture) = (self.path("pictured.html"), self.path("page.png"));
        std::fs::write(&path, page).unwrap();
        self.run(&[&format!("--screenshot={}", picture.display())], &path);
        Picture::read(&picture)
    }

    fn run(&self, what: &[&str], page: &Path) -> Output {
        let (width, height) = self.window;
        let mut command = Command::new("timeout");
        // Root has no sandbox to put it into; the rest keeps it from looking for news of its own.
        command.args(["--kill-after=5", "120", "chromium", "--headless", "--no-sandbox", "--disable-gpu"]);
        command.args(["--disable-quic", "--no-first-run", "--disable-background-networking"]);
        command.args([
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]);
        command.arg(format!("--user-data-dir={}", self.path("profile").display()));
        command.arg(format!("--window-size={width},{height}")).args(what).arg(format!("file://{}", page.display()));
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{what:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        output
    }
}

//! Reads of the large file by fio, where it is installed: what others measure disks with.

use std::{path::Path, process::Command};

use serde_json::Value;
use shoal::command::Failure;

use super::reads::RANDOM_READS;

/// What it is called, if it is there: `fio-3.33`.
pub(super) fn version() -> Option<String> {
    let output = Command::new("fio").arg("--version").output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// MiB/s of reading a file from its start to its end, a mebibyte at a time.
pub(super) fn sequential(path: &Path) -> Result<f64, Failure> {
    let said = run(path, &["--rw=read", "--bs=1M"])?;
    Ok(figure(&said, "bw_bytes")? / f64::from(1 << 20))
}

/// Reads a second of single pages at random places of a file.
pub(super) fn random(path: &Path, seed: u64) -> Result<f64, Failure> {
    let (seed, number) = (format!("--randseed={}", seed + 1), format!("--number_ios={RANDOM_READS}"));
    figure(&run(path, &["--rw=randread", "--bs=4k", "--norandommap", &seed, &number])?, "iops")
}

/// One reader with read(2) through the page cache, which fio drops the file's pages of before it begins.
fn run(path: &Path, arguments: &[&str]) -> Result<Value, Failure> {
    let mut fio = Command::new("fio");
    fio.args(["--name=shoal", "--readonly", "--ioengine=psync", "--thread", "--output-format=json"]);
    let output = fio.arg(format!("--filename={}", path.display())).args(arguments).output()?;
    if !output.status.success() {
        return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    // Notes may stand before what it says.
    let start = output.stdout.iter().position(|byte| *byte == b'{').ok_or("fio says nothing")?;
    Ok(serde_json::from_slice(&output.stdout[start..])?)
}

fn figure(said: &Value, name: &str) -> Result<f64, Failure> {
    let read = &said["jobs"][0]["read"];
    let complete = said["jobs"][0]["error"] == 0;
    read[name].as_f64().filter(|_| complete).ok_or_else(|| format!("fio says nothing of {name}: {read}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_failed_has_no_figure() {
        let said = |error: i32| serde_json::json!({ "jobs": [{ "error": error, "read": { "iops": 12.5 } }] });
        assert_eq!(figure(&said(0), "iops").unwrap(), 12.5);
        assert!(figure(&said(5), "iops").is_err() && figure(&said(0), "bw_bytes").is_err());
    }
}

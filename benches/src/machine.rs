//! What a measurement does with the machine and with other programs.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use shoal::command::Failure;

/// How often the memory of a program that runs is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// As after a boot, as far as files are concerned.
pub(crate) fn drop_caches() -> Result<(), Failure> {
    rustix::fs::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

/// Runs a program to its end, without what it prints.
pub(crate) fn finish(command: &mut Command) -> Result<(), Failure> {
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()).into()),
    }
}

/// The same, with how long it took, in seconds, and the most memory that was resident at a time, in bytes. The words of a program
/// that fails are in the file `log`.
pub(crate) fn measure(command: &mut Command, log: &Path) -> Result<(f64, u64), Failure> {
    let started = Instant::now();
    let words = fs::File::create(log)?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(words).spawn()?;
    let mut peak = 0;
    let status = loop {
        // The kernel keeps the most there was; nothing is there any more once it has ended.
        peak = memory_kib(child.id(), "VmHWM:").unwrap_or(peak);
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(LOOK_EVERY),
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    match status.success() {
        true => Ok((seconds, peak << 10)),
        false => Err(format!("{command:?}: {}", fs::read_to_string(log)?.trim()).into()),
    }
}

/// What proc(5) says in the line `what` of a process's status, in KiB.
pub(crate) fn memory_kib(pid: u32, what: &str) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix(what)?.trim().strip_suffix(" kB"));
    Ok(kib.ok_or_else(|| format!("no {what} of {pid} in proc"))?.trim().parse()?)
}

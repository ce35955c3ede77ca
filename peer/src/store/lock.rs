//! One owner per data directory: a lock that the kernel drops with the process, however that ends.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Write},
    path::Path,
};

use super::StoreError;

/// Enough for a pid and the path of a program; whoever owns the directory could have written anything.
const HOLDER_BYTES: u64 = 512;

/// Ownership of a data directory for as long as it lives.
pub(super) struct DirLock {
    file: File,
}

impl DirLock {
    pub(super) fn acquire(data_dir: &Path) -> Result<Self, StoreError> {
        let path = data_dir.join("lock");
        let failed = |source| StoreError::io(format!("locking {}", path.display()), source);
        fs::create_dir_all(data_dir).map_err(failed)?;
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked { path: data_dir.into(), holder: holder(file) });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", myself()).map_err(failed)?;
        Ok(Self { file })
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing alone does not do: a process that this one is just starting has the descriptor, too, until its exec.
        // If the kernel will not, the lock goes with the last descriptor, as it would have without the attempt.
        let _ = self.file.unlock();
    }
}

fn myself() -> String {
    let program = std::env::current_exe().unwrap_or_default();
    format!("pid {} ({})", std::process::id(), program.display())
}

fn holder(file: File) -> String {
    let mut text = String::new();
    // Between another's lock and its line, or if it is not text, there is nothing to tell.
    let read = file.take(HOLDER_BYTES).read_to_string(&mut text);
    match text.lines().next() {
        Some(line) if read.is_ok() && !line.is_empty() => line.to_owned(),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_given_up_although_a_process_being_started_has_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DirLock::acquire(dir.path()).unwrap();
        assert!(matches!(DirLock::acquire(dir.path()), Err(StoreError::Locked { .. })));
        let _started = lock.file.try_clone().unwrap();
        drop(lock);
        DirLock::acquire(dir.path()).unwrap();
    }
}

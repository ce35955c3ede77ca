//! The revocations that a node knows, on its disk: a node that restarts while nobody else is there must not let a
//! revoked one in.
//!
//! The file is one encoded list of signed revocations, replaced as a whole. A damaged one is reported and read as far
//! as it is good; what is missing comes back from the neighbours.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use crate::membership::{self, MAX_REVOCATIONS, MAX_SIGNED, Policy, RevocationError, Revocations};

/// Name of the file below the data directory.
const FILE: &str = "revocations";

/// A full list, with a few bytes around each entry.
const MAX_BYTES: u64 = (MAX_REVOCATIONS * (MAX_SIGNED + 8)) as u64;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    path: PathBuf,
}

impl Record {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join(FILE) }
    }

    /// What was written last; nothing if it never was.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub(crate) fn load(&self, policy: &Policy, now_unix: u64) -> io::Result<Revocations> {
        let mut bytes = Vec::new();
        match File::open(&self.path) {
            Ok(file) => file.take(MAX_BYTES).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Revocations::default()),
            Err(error) => return Err(error),
        };
        let mut revocations = Revocations::default();
        let damaged = |error: &RevocationError| tracing::error!(path = %self.path.display(), "{error}");
        for signed in membership::decode_list(&bytes).inspect_err(damaged).unwrap_or_default() {
            match revocations.insert(policy, &signed, now_unix) {
                Ok(_) | Err(RevocationError::Old) => {}
                Err(error) => damaged(&error),
            }
        }
        Ok(revocations)
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn store(&self, list: &[u8]) -> io::Result<()> {
        let dir = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let mut file = tempfile::Builder::new().prefix(".revocations").tempfile_in(dir)?;
        file.write_all(list)?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|error| error.error)?;
        fs::File::open(dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::Identity, membership::ClusterKey};

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn what_was_stored_is_loaded_and_damage_costs_no_more_than_itself() {
        let dir = tempfile::tempdir().unwrap();
        let key = ClusterKey::create(&dir.path().join("cluster")).unwrap();
        let record = Record::new(dir.path());
        assert!(record.load(&key.policy(), NOW).unwrap().is_empty());
        let signed: Vec<_> = (0..3).map(|_| key.revoke(Identity::generate().peer(), NOW).unwrap()).collect();
        let list = membership::encode_list(&signed);
        record.store(&list).unwrap();
        assert_eq!(record.load(&key.policy(), NOW).unwrap().len(), 3);
        let mut damaged = list.clone();
        damaged[20] ^= 1;
        record.store(&damaged).unwrap();
        assert_eq!(record.load(&key.policy(), NOW).unwrap().len(), 2);
        record.store(b"not a list").unwrap();
        assert!(record.load(&key.policy(), NOW).unwrap().is_empty());
    }
}

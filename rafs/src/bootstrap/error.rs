//! What can be wrong with a bootstrap.

use std::path::PathBuf;

use super::Nid;

/// Why a bootstrap, or a part of one, was refused.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// A rule of the format is broken.
    #[error("{structure} at byte {offset}: {problem}")]
    Invalid {
        /// What is broken.
        structure: &'static str,
        /// Where it starts in the bootstrap.
        offset: u64,
        /// The rule, with the values found.
        problem: String,
    },
    /// The format allows it, this reader does not do it.
    #[error("{structure} at byte {offset}: {what} is not supported")]
    Unsupported {
        /// What asks for it.
        structure: &'static str,
        /// Where it starts in the bootstrap.
        offset: u64,
        /// What it asks for.
        what: &'static str,
    },
    /// No directory leads to such an inode.
    #[error("there is no inode {nid}")]
    UnknownInode {
        /// What was asked for.
        nid: Nid,
    },
    /// A part of a file that is read in place could not be read.
    #[error("{structure} at byte {offset} cannot be read: {source}")]
    Read {
        /// What lies there.
        structure: &'static str,
        /// Where it starts in the bootstrap.
        offset: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file could not be read.
    #[error("cannot read bootstrap {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A place in the bootstrap, to say what is wrong there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    pub(crate) structure: &'static str,
    pub(crate) offset: u64,
}

impl At {
    pub(crate) fn new(structure: &'static str, offset: u64) -> Self {
        Self { structure, offset }
    }

    pub(crate) fn invalid(self, problem: impl Into<String>) -> BootstrapError {
        BootstrapError::Invalid { structure: self.structure, offset: self.offset, problem: problem.into() }
    }

    pub(crate) fn unsupported(self, what: &'static str) -> BootstrapError {
        BootstrapError::Unsupported { structure: self.structure, offset: self.offset, what }
    }

    /// `Ok` when the rule holds; the text is only made when it does not.
    pub(crate) fn require(self, holds: bool, problem: impl FnOnce() -> String) -> Result<(), BootstrapError> {
        if holds { Ok(()) } else { Err(self.invalid(problem())) }
    }
}

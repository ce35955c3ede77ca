//! Where bytes came from: the figures behind `shoal ctl status` and the metrics of the same names.
//!
//! Counted once per piece or object when it is accepted, never per retry; what was thrown away is counted apart. A piece
//! that is read again counts no more, and one that was fetched ahead of its reader counts by whom it came from.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use shoal_proto::control;

/// Where a piece or an object came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provenance {
    /// This node's own store.
    Local,
    /// A node that is not a seed peer.
    Peer,
    /// A seed peer.
    Seed,
    /// The registry, read by this node.
    Registry,
}

impl Provenance {
    const ALL: [Self; 4] = [Self::Local, Self::Peer, Self::Seed, Self::Registry];

    fn label(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Peer => "peer",
            Self::Seed => "seed",
            Self::Registry => "registry",
        }
    }
}

impl From<shoal_proto::Role> for Provenance {
    fn from(role: shoal_proto::Role) -> Self {
        match role {
            shoal_proto::Role::Node => Self::Peer,
            shoal_proto::Role::Seed => Self::Seed,
        }
    }
}

/// For each piece of a blob where it came from since the daemon started.
#[derive(Debug)]
pub struct PieceOrigins(Vec<AtomicU8>);

impl PieceOrigins {
    /// Of `len` pieces nothing is known yet.
    pub fn new(len: u32) -> Self {
        Self((0..len).map(|_| AtomicU8::new(0)).collect())
    }

    /// Notes where `piece` came from, unless that is known; gives what is known now, and whether it is news.
    pub fn note(&self, piece: u32, from: Provenance) -> (Provenance, bool) {
        let Some(known) = self.0.get(piece as usize) else { return (from, false) };
        match known.compare_exchange(0, from as u8 + 1, Relaxed, Relaxed) {
            Ok(_) => (from, true),
            Err(noted) => (Provenance::ALL[usize::from(noted - 1)], false),
        }
    }
}

#[derive(Debug, Default)]
struct PerOrigin([AtomicU64; Provenance::ALL.len()]);

impl PerOrigin {
    fn add(&self, from: Provenance, n: u64) {
        self.0[from as usize].fetch_add(n, Relaxed);
    }

    fn snapshot(&self) -> control::BySource {
        let of = |from: Provenance| self.0[from as usize].load(Relaxed);
        control::BySource {
            local: of(Provenance::Local),
            peer: of(Provenance::Peer),
            seed: of(Provenance::Seed),
            registry: of(Provenance::Registry),
        }
    }
}

/// Counters of one mount, or of the whole node.
#[derive(Debug, Default)]
pub struct Traffic {
    bytes: PerOrigin,
    chunks: PerOrigin,
    objects: PerOrigin,
    rejected_chunks: AtomicU64,
    rejected_bytes: AtomicU64,
}

impl Traffic {
    /// A piece of `bytes` encoded bytes with `chunks` chunks in it was accepted.
    pub fn piece(&self, from: Provenance, bytes: u64, chunks: u64) {
        self.bytes.add(from, bytes);
        self.chunks.add(from, chunks);
    }

    /// An object of `bytes` bytes was accepted.
    pub fn object(&self, from: Provenance, bytes: u64) {
        self.objects.add(from, bytes);
    }

    /// A piece of `bytes` encoded bytes with `chunks` chunks in it did not match and was thrown away.
    pub fn rejected(&self, bytes: u64, chunks: u64) {
        self.rejected_chunks.fetch_add(chunks, Relaxed);
        self.rejected_bytes.fetch_add(bytes, Relaxed);
    }

    /// The figures as they are now.
    pub fn snapshot(&self) -> control::Traffic {
        control::Traffic {
            bytes: Some(self.bytes.snapshot()),
            chunks: Some(self.chunks.snapshot()),
            objects: Some(self.objects.snapshot()),
            rejected_chunks: self.rejected_chunks.load(Relaxed),
            rejected_bytes: self.rejected_bytes.load(Relaxed),
        }
    }

    /// Sets the node's metrics to these figures.
    pub fn export(&self) {
        for origin in Provenance::ALL {
            let of = |counters: &PerOrigin| counters.0[origin as usize].load(Relaxed);
            let label = origin.label();
            metrics::counter!("shoal_piece_bytes_total", "origin" => label).absolute(of(&self.bytes));
            metrics::counter!("shoal_chunks_total", "origin" => label).absolute(of(&self.chunks));
            metrics::counter!("shoal_object_bytes_total", "origin" => label).absolute(of(&self.objects));
        }
        metrics::counter!("shoal_rejected_chunks_total").absolute(self.rejected_chunks.load(Relaxed));
        metrics::counter!("shoal_rejected_bytes_total").absolute(self.rejected_bytes.load(Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_origin_of_a_piece_stays() {
        let origins = PieceOrigins::new(2);
        assert_eq!(origins.note(1, Provenance::Registry), (Provenance::Registry, true));
        assert_eq!(origins.note(1, Provenance::Local), (Provenance::Registry, false));
        assert_eq!(origins.note(0, Provenance::Local), (Provenance::Local, true));
    }

    #[test]
    fn each_origin_counts_for_itself() {
        let traffic = Traffic::default();
        traffic.piece(Provenance::Seed, 100, 1);
        traffic.piece(Provenance::Peer, 10, 2);
        traffic.piece(Provenance::Peer, 5, 1);
        traffic.object(Provenance::Registry, 7);
        traffic.rejected(3, 1);
        let now = traffic.snapshot();
        assert_eq!(now.bytes, Some(control::BySource { local: 0, peer: 15, seed: 100, registry: 0 }));
        assert_eq!(now.chunks, Some(control::BySource { local: 0, peer: 3, seed: 1, registry: 0 }));
        assert_eq!(now.objects, Some(control::BySource { local: 0, peer: 0, seed: 0, registry: 7 }));
        assert_eq!((now.rejected_chunks, now.rejected_bytes), (1, 3));
    }
}

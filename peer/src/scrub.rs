//! Scrubbing: everything in the store is verified again, and what does not verify is dropped, to be fetched again when it is
//! wanted. Reads do so anyway; this finds damage before a reader or a neighbour does, and while there is still somebody
//! to fetch it from.
//!
//! An object is verified by its name. A piece is verified against every bootstrap in the store that names it; the index
//! knows too little of it. The same holds for decoded forms of blobs. Pieces of images whose bootstrap was evicted cannot be
//! verified before it is back, and are counted; so are those of encrypted images, where nobody has the key. Where somebody has it,
//! what opens a bootstrap layer is in the image's manifest, which is in the store as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    sync::Arc,
};

use bytes::Bytes;
use shoal_proto::{Bitfield, DecodedId, ObjectId, control::ScrubProgress};
use shoal_rafs::{
    PieceTable, check_expanded,
    oci::{LayerSeal, Manifest, SealError},
};
use shoal_scheduler::Item;

use crate::{
    images::{Unpacked, scheduled},
    store::{BlobHandle, BlobKey, Store, StoreError},
};

/// Pieces between two words of progress.
const STEP: u64 = 64;

/// Who wants to hear of a scrub.
pub(crate) trait Listener {
    /// So far; false to end the scrub.
    fn progress(&mut self, now: ScrubProgress) -> bool;
    /// This piece is no longer here.
    fn lost(&mut self, item: Item);
}

/// Decrypts a bootstrap layer, with whatever keys there are.
pub(crate) type Opener<'a> = dyn Fn(ObjectId, Bytes, &LayerSeal) -> Result<Bytes, SealError> + 'a;

/// Verifies the whole store, and gives the result. Blocks. Does not count as use.
///
/// # Errors
/// The index fails, or a damaged object cannot be removed. What a disk cannot read counts as damaged.
pub(crate) fn run(
    store: &Store,
    open: &Opener<'_>,
    listener: &mut dyn Listener,
) -> Result<ScrubProgress, StoreError> {
    let now = ScrubProgress { total_bytes: store.usage()?.bytes, ..ScrubProgress::default() };
    let (verified, forms, seals) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
    let mut scrub = Scrub { store, open, listener, now, verified, forms, seals };
    for id in store.object_ids() {
        if !scrub.object(id)? {
            return Ok(scrub.now);
        }
    }
    for (layer, seal) in std::mem::take(&mut scrub.seals) {
        if !scrub.sealed(layer, &seal)? {
            return Ok(scrub.now);
        }
    }
    store.tidy()?;
    scrub.now.unverified_pieces = store.usage()?.pieces.saturating_sub(scrub.now.pieces);
    Ok(scrub.now)
}

struct Scrub<'a> {
    store: &'a Store,
    open: &'a Opener<'a>,
    listener: &'a mut dyn Listener,
    now: ScrubProgress,
    /// Pieces that need not be looked at for another image.
    verified: BTreeMap<BlobKey, Bitfield>,
    /// Decoded forms that need not be looked at either.
    forms: BTreeSet<DecodedId>,
    /// How bootstrap layers are encrypted, from the manifests that name them.
    seals: BTreeMap<ObjectId, LayerSeal>,
}

impl Scrub<'_> {
    /// Verifies an object, and what it names if it is a bootstrap layer; false when nobody listens any more.
    fn object(&mut self, id: ObjectId) -> Result<bool, StoreError> {
        if !self.store.has_object(id) {
            // Evicted since.
            return Ok(true);
        }
        let Some(bytes) = self.store.inspect_object(id)? else {
            self.now.damaged_objects += 1;
            return Ok(true);
        };
        self.now.objects += 1;
        if bytes.starts_with(b"{")
            && let Ok(Manifest::Image(manifest)) = Manifest::parse(&bytes)
        {
            self.seals.extend(manifest.seal.map(|seal| (manifest.bootstrap.id, seal)));
        }
        self.layer(&bytes, id)
    }

    /// Verifies what an encrypted bootstrap layer names, if it is here and can be opened.
    fn sealed(&mut self, layer: ObjectId, seal: &LayerSeal) -> Result<bool, StoreError> {
        if !self.store.has_object(layer) {
            return Ok(true);
        }
        let Some(bytes) = self.store.inspect_object(layer)? else { return Ok(true) };
        match (self.open)(layer, bytes, seal) {
            Ok(opened) => self.layer(&opened, layer),
            Err(error) => {
                tracing::info!("pieces are not verified: {}", crate::chain(&error));
                Ok(true)
            }
        }
    }

    /// Verifies what a bootstrap layer names. Most objects are manifests and no layers, which shows in their first bytes.
    fn layer(&mut self, bytes: &[u8], id: ObjectId) -> Result<bool, StoreError> {
        for table in self.tables(bytes, id)? {
            if !self.blob(&table)? {
                return Ok(false);
            }
        }
        Ok(self.listener.progress(self.now))
    }

    /// The blobs of a bootstrap layer as far as the store can tell their pieces; none for any other object.
    fn tables(&self, bytes: &[u8], id: ObjectId) -> Result<Vec<Arc<PieceTable>>, StoreError> {
        let Ok(layer) = Unpacked::read(bytes, id) else { return Ok(Vec::new()) };
        let meta = |(id, _)| Ok(self.store.inspect_object(id)?.map(|bytes| (id, bytes)));
        let metas = layer.metas().map(meta).filter_map(Result::transpose).collect::<Result<_, StoreError>>()?;
        Ok(layer.tables(&metas).unwrap_or_default())
    }

    fn blob(&mut self, table: &Arc<PieceTable>) -> Result<bool, StoreError> {
        self.decoded(table)?;
        let Some(handle) = self.store.existing_blob(table)? else { return Ok(true) };
        for (piece, _) in table.pieces() {
            let known = self.verified.entry(handle.key()).or_insert_with(|| Bitfield::new(table.len()));
            if !handle.is_present(piece) || known.contains(piece) {
                continue;
            }
            self.piece(&handle, piece)?;
            if (self.now.pieces + self.now.damaged_pieces).is_multiple_of(STEP) && !self.listener.progress(self.now) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Verifies the decoded form of a blob. A mount that has a damaged one shows the damage; the next one gets another.
    fn decoded(&mut self, table: &PieceTable) -> Result<(), StoreError> {
        let id = table.decoded_id();
        if !self.forms.insert(id) {
            return Ok(());
        }
        let Some(path) = self.store.inspect_decoded(id) else { return Ok(()) };
        match File::open(&path).and_then(|file| check_expanded(table, &file)) {
            Ok(()) => self.now.decoded += 1,
            Err(error) => {
                tracing::error!(path = %path.display(), "damaged decoded form, dropped: {}", crate::chain(&error));
                self.store.drop_decoded(id)?;
                self.now.damaged_decoded += 1;
            }
        }
        Ok(())
    }

    fn piece(&mut self, handle: &BlobHandle, piece: u32) -> Result<(), StoreError> {
        let verified = match handle.inspect(piece) {
            // Evicted since.
            Ok(None) => return Ok(()),
            Ok(Some(bytes)) => {
                let decoded = handle.table().decode(piece, &bytes);
                decoded.map(|_| bytes.len() as u64).map_err(|error| crate::chain(&error))
            }
            Err(error) => Err(crate::chain(&error)),
        };
        match verified {
            Ok(bytes) => {
                self.now.pieces += 1;
                self.now.bytes += bytes;
                if let Some(known) = self.verified.get_mut(&handle.key()) {
                    known.insert(piece);
                }
            }
            Err(why) => {
                tracing::warn!(blob = %handle.key().blob, piece, "damaged in the store, dropped: {why}");
                handle.forget(piece)?;
                self.now.damaged_pieces += 1;
                self.listener.lost(Item { blob: scheduled(handle.key()), piece });
            }
        }
        Ok(())
    }
}

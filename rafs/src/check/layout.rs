//! Who owns which byte of the bootstrap: nobody's bytes are zero, no byte has two owners, tables are in order.

use super::CheckReport;
use crate::bootstrap::{Bootstrap, BootstrapError, Nid};

/// Looks at every byte.
pub(super) fn check(image: &Bootstrap, report: &mut CheckReport) -> Result<(), BootstrapError> {
    owners(image, report)?;
    record_order(image, report);
    device_map(image, report);
    Ok(())
}

fn owners(image: &Bootstrap, report: &mut CheckReport) -> Result<(), BootstrapError> {
    let bytes = image.as_bytes();
    let mut parts = image.tables();
    let mut seen = vec![0u64; bytes.len() / 32 / 64 + 1];
    let mut nids = vec![image.root()];
    while let Some(nid) = nids.pop() {
        if !first_visit(&mut seen, nid) {
            continue;
        }
        let inode = image.inode(nid)?;
        parts.extend(inode.parts());
        for entry in inode.entries() {
            let entry = entry?;
            nids.extend((entry.name != b"." && entry.name != b"..").then_some(entry.nid));
        }
    }
    parts.sort_unstable_by_key(|(range, _)| (range.start, range.end));
    let (mut end, mut before) = (0u64, "start");
    for (range, what) in &parts {
        if range.start < end {
            report.problem(format!("{what} at byte {}", range.start), format!("it overlaps the {before} before it"));
        } else {
            padding(&bytes[end as usize..range.start as usize], end, report);
        }
        if range.end >= end {
            (end, before) = (range.end, what);
        }
    }
    padding(&bytes[end as usize..], end, report);
    Ok(())
}

fn first_visit(seen: &mut [u64], nid: Nid) -> bool {
    let word = &mut seen[(nid.0 / 64) as usize];
    let new = *word & (1 << (nid.0 % 64)) == 0;
    *word |= 1 << (nid.0 % 64);
    new
}

fn padding(bytes: &[u8], offset: u64, report: &mut CheckReport) {
    if let Some(position) = bytes.iter().position(|byte| *byte != 0) {
        let at = offset + position as u64;
        report.problem(format!("padding at byte {at}"), "it is not zero, and nothing in the tree leads there");
    }
}

/// Readers that search the table rely on its order.
fn record_order(image: &Bootstrap, report: &mut CheckReport) {
    let mut previous = None;
    for (number, record) in image.records().enumerate() {
        let key = (record.digest, record.blob.get());
        if previous.is_some_and(|previous| previous > key) {
            return report
                .problem(format!("chunk record {number}"), "the records are not in the order of their digests");
        }
        previous = Some(key);
    }
}

/// On a flat device bootstrap and blobs must not overlap.
fn device_map(image: &Bootstrap, report: &mut CheckReport) {
    let block = image.block_size();
    let mut end = image.as_bytes().len() as u64 / block;
    let mut mapped: Vec<_> = image.blobs().iter().filter(|blob| blob.mapped_block != 0).collect();
    mapped.sort_by_key(|blob| blob.mapped_block);
    for blob in mapped {
        let start = u64::from(blob.mapped_block);
        if start < end {
            let problem = format!("mapped at block {start}, where something else reaches to {end}");
            report.problem(format!("device slot of blob {}", blob.id), problem);
        }
        end = end.max(start + blob.decoded_size.div_ceil(block));
    }
}

//! Parses filters of a list of snapshots, one a line: an error that points into one of them, or a filter that holds or not,
//! and holds for each line if it holds for any.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_snapshots::Filter;

fuzz_target!(|data: &str| {
    let filters: Vec<&str> = data.lines().collect();
    // Every field is there, but for those with an odd number of letters.
    let value = |path: &[String]| path.last().filter(|field| field.len() % 2 == 0).map(|_| "sha256:ab");
    match Filter::parse(&filters) {
        Ok(all) => {
            let each = |filter: &&str| Filter::parse(&[filter]).expect("it was good before").matches(value);
            assert_eq!(all.matches(value), filters.is_empty() || filters.iter().any(|filter| each(filter)));
        }
        Err(error) => assert!(filters.iter().any(|filter| error.position <= filter.len())),
    }
});

//! What is made of several measurements of the same thing.

/// The one in the middle, the greater of two.
pub(crate) fn median<T: Copy + Default + PartialOrd>(values: &[T]) -> T {
    percentile(values, 50)
}

/// The value that `percent` of 100 others do not exceed; the default of none.
pub(crate) fn percentile<T: Copy + Default + PartialOrd>(values: &[T], percent: usize) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let place = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(place).copied().unwrap_or_default()
}

/// The least and the most.
pub(crate) fn spread(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::MAX, f64::MIN), |(least, most), &value| (least.min(value), most.max(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median::<u64>(&[]), median(&[1, 2])), (2.0, 0, 2));
        let hundred: Vec<u32> = (0..100).rev().collect();
        assert_eq!([50, 95, 99, 100].map(|percent| percentile(&hundred, percent)), [50, 95, 99, 99]);
        assert_eq!(spread(&[2.0, 1.0, 3.0]), (1.0, 3.0));
    }
}

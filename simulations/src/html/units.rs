//! Bytes and rates as people read them.

/// The unit for values up to this many bytes, in bytes, and its name.
pub(super) fn bytes_unit(most: f64) -> (f64, &'static str) {
    match most {
        1e12.. => (1e12, "TB"),
        1e9.. => (1e9, "GB"),
        _ => (1e6, "MB"),
    }
}

/// The unit for rates up to this many bits per second, and its name.
pub(super) fn bits_unit(most: f64) -> (f64, &'static str) {
    match most {
        1e12.. => (1e12, "Tbit/s"),
        1e9.. => (1e9, "Gbit/s"),
        _ => (1e6, "Mbit/s"),
    }
}

/// Bytes with a unit.
pub(super) fn bytes(bytes: f64) -> String {
    let (unit, name) = bytes_unit(bytes);
    format!("{:.2} {name}", bytes / unit)
}

/// A rate of so many bytes per second, in bits.
pub(super) fn bits(bytes_per_s: f64) -> String {
    let (unit, name) = bits_unit(bytes_per_s * 8.0);
    format!("{} {name}", super::chart::plain(bytes_per_s * 8.0 / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_units_of_their_size() {
        assert_eq!([0.0, 1.5e6, 2e9, 3e12].map(bytes), ["0.00 MB", "1.50 MB", "2.00 GB", "3.00 TB"]);
        assert_eq!([1.25e6, 1.25e9, 2.5e11].map(bits), ["10 Mbit/s", "10 Gbit/s", "2 Tbit/s"]);
    }
}

//! The images of a swarm, and which of them each node starts. All are of one size; they share nodes, links and seed peers, and
//! no byte.

use rand::Rng;
use shoal_scheduler::BlobKey;

use crate::scenario::Images;

/// An image, the most popular first.
pub(crate) type Image = u16;

/// Every byte of the first image's key.
const FILL: u8 = 0x5a;

/// The blob of an image.
pub(crate) fn key(image: Image) -> BlobKey {
    let mut id = [FILL; 32];
    for (byte, of_image) in id.iter_mut().zip(image.to_le_bytes()) {
        *byte ^= of_image;
    }
    BlobKey { id, variant: 0 }
}

/// The image of a blob.
pub(crate) fn of_key(blob: BlobKey) -> Image {
    Image::from_le_bytes([blob.id[0] ^ FILL, blob.id[1] ^ FILL])
}

/// Draws the images that one node starts, each of them once: the image of rank `r` with a probability that goes as
/// `1 / r^zipf`, of those that are left. Nothing is drawn where there is one image.
pub(crate) fn drawn(images: &Images, rng: &mut impl Rng) -> Vec<Image> {
    if images.count == 1 {
        return vec![0];
    }
    let mut weights: Vec<f64> = (1..=images.count).map(|rank| f64::from(rank).powf(-images.zipf)).collect();
    let mut draw = |_| {
        let mut left = weights.iter().sum::<f64>() * (f64::from(rng.next_u32()) / 2f64.powi(32));
        // Rounding must not leave a draw without an image.
        let last = weights.iter().rposition(|&weight| weight > 0.0).unwrap_or_default();
        let hit = |weight: &f64| {
            left -= weight;
            left < 0.0
        };
        let image = weights.iter().position(hit).unwrap_or(last);
        weights[image] = 0.0;
        image as Image
    };
    (0..images.starts_per_node).map(&mut draw).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn keys_name_images() {
        for image in [0, 1, 0x5a5a, Image::MAX] {
            assert_eq!(of_key(key(image)), image);
        }
    }

    #[test]
    fn the_first_image_is_started_most() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let images = Images { count: 10, zipf: 1.0, starts_per_node: 1 };
        let mut started = [0.0; 10];
        for _ in 0..20_000 {
            started[usize::from(drawn(&images, &mut rng)[0])] += 1.0 / 20_000.0;
        }
        let all: f64 = (1..=10).map(|rank| 1.0 / f64::from(rank)).sum();
        for (found, rank) in started.iter().zip(1..) {
            let expected = 1.0 / f64::from(rank) / all;
            assert!((found - expected).abs() < 0.012, "rank {rank}: {found} for {expected}");
        }
    }

    #[test]
    fn a_node_starts_no_image_twice() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for zipf in [0.0, 1.0, 10.0] {
            let mut images = drawn(&Images { count: 6, zipf, starts_per_node: 6 }, &mut rng);
            images.sort_unstable();
            assert_eq!(images, [0, 1, 2, 3, 4, 5], "zipf {zipf}");
        }
    }
}

//! Randomness that can be repeated.

use std::sync::OnceLock;

use rand::SeedableRng;
use rand::rngs::StdRng;

/// The seed of this test run: `WALLABY_SEED`, or a random one. Printed with the output of a test that uses it, so that a failure can be repeated.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    let seed = *SEED.get_or_init(|| {
        let named = std::env::var("WALLABY_SEED").ok();
        let named = named.map(|text| text.parse().unwrap_or_else(|_| panic!("WALLABY_SEED is not a number: {text}")));
        named.unwrap_or_else(rand::random)
    });
    eprintln!("WALLABY_SEED={seed}");
    seed
}

/// A generator that starts from the seed.
pub trait Seeded {
    /// From [`seed`], which it prints.
    fn seeded() -> Self;
}

impl Seeded for StdRng {
    fn seeded() -> Self {
        Self::seed_from_u64(seed())
    }
}

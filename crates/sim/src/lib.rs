//! A device, its guest, its VMM and its backends, simulated as a whole on the real `wire` and `core`: one seed, one clock.
//!
//! A run has two phases. In the *safety* phase everything goes wrong that [`Options`] allow; every check holds all the time. In
//! the *liveness* phase nothing more goes wrong, and everything that was issued must come to its end and the device be whole again.
//! In the end everybody leaves, no descriptor is left open, and the power fails: what was flushed must be there.
//!
//! What is real: `warmswap_core::Pair`, every message, the in-flight region's `Tracker`, split rings in bytes. What is simulated: the
//! program around the pair, the guest's driver, VMMs, backends, the disk. Every store of the driver or of a backend into shared memory is
//! a step of its own, and a process may die between any two.
//!
//! Not simulated: several devices of one broker, migration, packed rings, backends that write what was never
//! asked for.
//!
//! ```
//! let options = warmswap_sim::Options::from_seed(7);
//! let outcome = warmswap_sim::run(7, &options);
//! assert_eq!(outcome.failure, None);
//! ```

#![forbid(unsafe_code)]

mod backend;
mod broker;
mod death;
mod disk;
mod faults;
mod guest;
mod keeper;
mod ledger;
mod memory;
mod options;
mod outcome;
mod pace;
mod process;
mod random;
mod script;
mod stream;
mod verdict;
mod vmm;
mod words;
mod worker;
mod world;

pub use options::{Class, Faults, Keeping, Options, Sabotage, VmmRule};
pub use outcome::{Failure, Outcome, Stats};

use warmswap_core::Nanos;

/// One run. The same seed and options give the same outcome.
#[must_use]
pub fn run(seed: u64, options: &Options) -> Outcome {
    world::World::new(seed, options, None).run()
}

/// The same run, told step by step.
#[must_use]
pub fn replay(seed: u64, options: &Options, trace: &mut dyn FnMut(Nanos, &str)) -> Outcome {
    world::World::new(seed, options, Some(trace)).run()
}

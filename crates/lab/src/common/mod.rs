//! What several instruments need in the same way. What only looks alike stays where it is: `vm` ends what it starts on every way
//! out, panics included, and repeats its plans from a generator that its guest has, too.

pub(crate) mod blk;
pub(crate) mod broker;
pub(crate) mod cgroup;
pub(crate) mod commit;
pub(crate) mod interrupt;
pub(crate) mod lines;
pub(crate) mod process;
pub(crate) mod qsd;
pub(crate) mod rng;
pub(crate) mod systemd;
pub(crate) mod together;
pub(crate) mod workspace;

//! What several instruments need in the same way.

pub(crate) mod interrupt;

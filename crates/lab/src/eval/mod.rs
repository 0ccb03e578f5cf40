//! What the evaluation of detectors rests on: the measures, and the tables they are computed from.

pub(crate) mod columns;
pub(crate) mod period;
pub(crate) mod table;
pub(crate) mod vus;

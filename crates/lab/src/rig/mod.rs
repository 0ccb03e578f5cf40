//! `lab rig`: real broker, real backends, real kills, an independent oracle. No VM.

pub(crate) mod qsd;
mod sys;

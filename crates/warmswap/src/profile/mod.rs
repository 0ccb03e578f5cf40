//! The profile of a backend: what is measured of it, and where from.

pub(crate) mod group;
pub(crate) mod host;
pub(crate) mod page;
pub(crate) mod process;
pub(crate) mod source;
mod text;
mod threads;

#[cfg(test)]
mod costs;

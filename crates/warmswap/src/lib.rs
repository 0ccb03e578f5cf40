//! The warmswap program as a library: the binary and the laboratory run the same code.
//!
//! - `driver`: the control thread, the only one that touches devices
//! - `control`: the control socket, on threads of its own
//! - `journal`: events, on a thread of its own
//! - `profile`: what is measured of a backend, and what is kept of it, on a thread of its own
//! - `cli`: the command line
//!
//! `unsafe` is confined to `shm` (memory shared with a guest), `process::launch` (between fork and exec), `storage::mark` (locks on
//! open file descriptions) and `driver::system` (signals, scheduling, peers).

mod cgroup;
pub mod cli;
mod config;
pub mod control;
mod driver;
mod fds;
mod journal;
mod process;
mod profile;
mod shm;
mod storage;

#[cfg(feature = "lab")]
pub use cli::guard_together;

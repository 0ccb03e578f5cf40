//! The warmswap program as a library: the binary and the laboratory run the same code.
//!
//! - `driver`: the control thread, the only one that touches devices
//! - `control`: the control socket, on threads of its own
//! - `journal`: events, on a thread of its own
//! - `profile`: what is measured of a backend, and what is kept of it, on a thread of its own
//! - `cli`: the command line
//!
//! `unsafe` is confined to `shm` (memory shared with a guest), `process::launch` (between fork and exec), `process::peer` (who is
//! at the other end of a socket), `storage::mark` (locks on open file descriptions), `driver::kicks` (a ring shared with the kernel) and
//! `driver::system` (signals, scheduling).

mod cgroup;
pub mod cli;
mod config;
pub mod control;
mod driver;
mod fds;
mod hook;
mod journal;
mod process;
mod profile;
mod shm;
mod storage;

#[cfg(feature = "lab")]
pub use cli::guard_together;

//! What outlives the broker: a store of descriptors, as a parent process that does nothing else.
//!
//! [`Keeper`] is that process. It starts one command, holds whatever descriptors the command sends it, and when the command dies it
//! starts it again with all of them. The protocol is that of systemd's descriptor store (sd_notify(3), sd_listen_fds(3)), so
//! that a service under systemd needs no keeper and no other code: [`Store`] is the command's side, whoever holds the descriptors.

pub mod store;

pub use store::{Kept, Store};

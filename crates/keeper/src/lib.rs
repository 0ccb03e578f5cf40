//! What outlives the broker: a store of descriptors, as a parent process that does nothing else.
//!
//! [`Keeper`] is that process. It starts one command, holds whatever descriptors the command sends it, and when the command dies it
//! starts it again with all of them. The protocol is that of systemd's descriptor store (sd_notify(3), sd_listen_fds(3)), so
//! that a service under systemd needs no keeper and no other code: [`Store`] is the command's side, whoever holds the descriptors.
//!
//! The keeper's own side is `protocol` (a datagram as a value), `table` (what is held), `child` (the command) and `run` (the loop).
//! It allocates nothing once it is prepared, writes no file and knows nothing of devices.
//!
//! What it does not protect against is its own death: the command and all that it serves go on, but what only the keeper held
//! is lost with it, and nobody starts the command again.

mod child;
mod datagram;
mod line;
pub mod protocol;
mod run;
pub mod store;
pub mod table;

pub use run::{DESCRIPTORS_DEFAULT, Keeper, Options, RESTART};
pub use store::{Kept, Store};

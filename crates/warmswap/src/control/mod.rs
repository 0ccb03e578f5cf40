//! The control socket: one JSON object per line each way, on a Unix socket whose file mode is the permission.

mod client;
pub(crate) mod json;
mod server;

pub use client::{Client, ClientError};
pub(crate) use server::{exit_code, serve};

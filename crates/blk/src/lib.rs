//! A vhost-user back-end for one virtio block device: a raw file or block device, served by io_uring or by plain calls.
//!
//! What it is careful about is what comes after it. It may be killed between any two of its instructions, and whoever serves the rings
//! next finds out exactly what it owed: from the rings, or from the in-flight region it keeps as the specification has it
//! (`warmswap_wire::inflight`). Asked to stop a ring, it completes everything it has taken first. On every description of its image
//! lies a lock of its own, so that the end of its I/O can be seen when the process is gone ([`image`]). What it does is told
//! on a page that others can read (`warmswap_telemetry`).
//!
//! | module | subject |
//! |---|---|
//! | `server`, `session` | the control thread: the process, and one front-end |
//! | `pool`, `worker`, `queue` | the threads that serve, their loop, and one queue |
//! | `ring`, `chain`, `request` | the virtqueue, the buffers of a request, what it asks for |
//! | `engine`, [`image`] | how blocks are read and written, and where |
//! | `memory`, `log` | what is shared with the front-end |
//! | [`sandbox`] | what the process gives up once it runs |
//!
//! `unsafe` is confined to `memory` (shared with the guest), `engine` (calls on guest memory), `image` (locks), `server` (signals and
//! an inherited descriptor), `sandbox::runtime` (the allocator's settings) and, in the laboratory's build, `faults` (the end).

pub mod image;
pub mod sandbox;

mod chain;
mod clock;
mod device;
mod engine;
#[cfg(feature = "lab")]
pub mod faults;
#[cfg(test)]
mod guest;
mod log;
mod memory;
mod options;
mod pool;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod token;
mod worker;

pub use options::{Endpoint, EngineKind, LOOK_MAX, Options, QUEUES_MAX};
#[cfg(any(test, feature = "fuzzing"))]
pub use queue::fuzzing;
pub use server::{RunError, run};

/// Tells an operator something, on standard error.
fn tell(text: &str) {
    use std::io::Write;
    // A fuzzer's drivers give it more to tell than anybody could read.
    if cfg!(any(test, feature = "fuzzing")) {
        return;
    }
    // Nobody has to read it.
    let _unread = writeln!(std::io::stderr(), "warmswap blk: {text}");
}

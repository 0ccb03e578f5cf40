//! A guest of our own: the driver half of virtio-blk and a vhost-user front-end, in user space, without a VM.
//!
//! It drives real back-ends through real rings: split rings in a memfd, EVENT_IDX, indirect descriptors, direct chains,
//! several queues, interrupts by eventfd exactly as Linux' `virtio_ring.c` asks for them, or polling. The front-end sends
//! the messages of QEMU 10 in QEMU's order. The same code drives a backend directly and a device guarded by warmswap; only
//! the socket's path differs.
//!
//! From the bottom up:
//!
//! * [`Mapping`], [`Window`]: shared memory as atomics. All `unsafe` of the module is in `map.rs`.
//! * [`GuestMemory`]: guest RAM of any size (sparse), regions that come and go, allocation.
//! * `Vring`: the driver half of a split ring. Heads in, heads out; no idea of block requests.
//! * [`BlkQueue`]: a ring with block requests in fixed slots, its kick and its call. Owns everything it needs, so a
//!   queue may be moved to a thread of its own (`std::mem::take(&mut guest.queues)`).
//! * `FrontEnd`: one connection to a backend or to the broker.
//! * [`Guest`]: all of it together: connect, start, load, stop, reconnect, hotplug, mask and unmask.
//!
//! A latency bench in ten lines:
//!
//! ```ignore
//! let mut guest = Guest::new(Options { socket: path, ..Options::default() })?;
//! guest.connect()?;
//! guest.start()?;
//! let queue = &mut guest.queues[0];
//! queue.submit(0, Request::read(17, 1))?;
//! queue.kick();
//! queue.wait_for_call(deadline)?;                 // or spin: polling needs no call
//! queue.disable_calls();
//! while let Some(done) = queue.pop()? {
//!     latencies.record(done.completed_ns - done.submitted_ns)?;
//! }
//! queue.enable_calls();                           // false: more was used meanwhile, go on popping
//! ```
//!
//! Nothing on the path from `submit` to `pop` allocates.

mod blk;
mod channel;
mod clock;
mod device;
mod front_end;
mod map;
mod memory;
mod notify;
#[cfg(test)]
mod real;
mod stats;
mod vring;

pub(crate) use blk::{BLOCK, BlkQueue, Completion, Kind, QueueShape, Request, Slot, Status};
pub(crate) use channel::Acks;
pub(crate) use clock::now_ns;
pub(crate) use device::{Guest, Options};
pub(crate) use map::Mapping;
pub(crate) use memory::{GuestMemory, Window};
pub(crate) use notify::EventFd;
pub(crate) use stats::Latencies;
pub(crate) use vring::VringFault;

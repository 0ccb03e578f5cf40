//! The truth about a device, its primary and its shadow, without I/O.
//!
//! [`Pair::handle`] takes what happened, the time, and guest memory, and says what is to be done. It reads no clock, no file, no
//! environment and no random number, so a script of events replays to the same actions, and a simulator can drive it.
//!
//! Calling order: [`Pair::new`], [`Pair::start`], then [`Pair::handle`] for every event and [`Event::Tick`] not later than
//! [`Pair::next_timeout`]. Requests of the VMM are delivered one at a time, while [`Pair::wants_request`] says so.

#![forbid(unsafe_code)]

mod canary;
mod drain;
mod event;
mod failover;
mod foresight;
mod journal;
mod link;
mod memory;
mod meter;
mod observer;
mod pair;
mod policy;
mod probe;
mod session;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
mod time;

pub use drain::DrainMethod;
pub use event::{Action, Actions, BackendId, CommandId, Event, FenceLevel, PrivateEvents, StateDirection};
pub use failover::{Kind, Outcome, Phase, Recovery, Report};
pub use foresight::{Foresight, PolicyStatus, Withheld};
pub use journal::{Entry, Severity, Value};
pub use link::{LinkState, Offer};
pub use memory::{GuestMemory, MemoryError, PRIVATE_ADDR, PRIVATE_SIZE, RingPlace};
pub use meter::RingMeter;
pub use observer::{Gap, Knowledge, Observation, Observer, SILENCE_MAX, Violation};
#[cfg(any(test, feature = "fuzzing"))]
pub use pair::run as fuzz_pair;
pub use pair::{BackendStatus, Counters, Pair, PairState, RingStatus, Status};
pub use policy::{Limits, OnPrediction, PairConfig, RegionUse, Survivors};
pub use probe::{Asked, FOLLOWED_MAX, Next, Probe, RingReader, Sampled, Trail};
pub use session::{NamedFd, Ring, Session, SessionError};
pub use time::Nanos;

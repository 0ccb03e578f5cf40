//! What outlives this process, so that the next one can go on where it ended.
//!
//! Descriptors lie in a store outside (systemd's, or that of [`warmswap_keeper`]); what they are for, and where the device stands, is
//! written into a memfd of each device (its *ledger*) before anything is done that has an effect outside:
//!
//! ```text
//! look at what came ─▶ step of the core ─▶ write the record ─▶ store into guest memory ─▶ take, send, count (one system call) ─▶ the rest
//! ```
//! What has come is looked at where it lies and taken away only together with what is sent because of it. A broker that dies before the
//! record leaves everything as it was, for the next one to find. One that dies after it leaves a record whose number the counter has not
//! reached: the next one does what it says. What comes after the counter is harmless if it is done twice.
//!
//! Looks at rings have no effect outside and lead to no record. What they tell is noted down behind the record's two places, for the case
//! that a backend dies together with the broker.

mod configuration;
mod doing;
mod ledger;
mod notes;
mod record;

pub(crate) use self::doing::{Deed, has_room_for, look_without_taking};
pub(crate) use self::ledger::{Keeping, Ledger, Taken};
pub(crate) use self::record::{
    BackendRecord, Channel, ConnectionRecord, FORMAT, FenceRecord, MarkRecord, MemberRecord, Message, Outbox,
    ProcessRecord, Record, Shell, StorageRecord, VmmRecord,
};

//! Who is connected to a control socket. There are so many places; where all are taken, whoever has asked nothing for longest makes room,
//! so that clients which only hold a connection never keep an operator out.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connections at a time.
pub(super) const CONNECTIONS_MAX: usize = 64;
/// Most connections that were made to leave and whose threads have not noticed yet.
const LEAVING_MAX: usize = 64;

#[derive(Debug, Default)]
struct Taken {
    by: BTreeMap<u64, Sitting>,
    /// Of the next place.
    number: u64,
    /// Counts the times at which somebody became idle.
    turn: u64,
    leaving: usize,
}

#[derive(Debug)]
struct Sitting {
    stream: Arc<UnixStream>,
    /// Since which turn it asks nothing; none while a command of it is answered.
    idle_since: Option<u64>,
}

/// All places.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

/// One place, free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    number: u64,
}

/// A command is being answered, until this is dropped.
#[derive(Debug)]
pub(super) struct Busy<'a>(&'a Place);

impl Places {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection; `None` where every other is being answered.
    pub(super) fn take(&self, stream: &Arc<UnixStream>) -> Option<Place> {
        let mut taken = self.lock();
        if taken.by.len() >= CONNECTIONS_MAX {
            let idle = taken.by.iter().filter_map(|(number, it)| Some((it.idle_since?, *number)));
            let (_, longest) = idle.min().filter(|_| taken.leaving < LEAVING_MAX)?;
            if let Some(left) = taken.by.remove(&longest) {
                taken.leaving += 1;
                // Its thread reads the end of the stream, and ends.
                let _gone = left.stream.shutdown(Shutdown::Both);
            }
        }
        let (number, turn) = (taken.number, taken.turn);
        taken.number += 1;
        taken.turn += 1;
        taken.by.insert(number, Sitting { stream: Arc::clone(stream), idle_since: Some(turn) });
        Some(Place { places: self.clone(), number })
    }
}

impl Place {
    /// Takes note that a command came.
    pub(super) fn busy(&self) -> Busy<'_> {
        if let Some(sitting) = self.places.lock().by.get_mut(&self.number) {
            sitting.idle_since = None;
        }
        Busy(self)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.places.lock();
        let turn = taken.turn;
        taken.turn += 1;
        if let Some(sitting) = taken.by.get_mut(&self.0.number) {
            sitting.idle_since = Some(turn);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if taken.by.remove(&self.number).is_none() {
            taken.leaving -= 1;
        }
    }
}

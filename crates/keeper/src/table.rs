//! What is held: descriptors by name, of fixed capacity.
//!
//! The descriptor of entry `i` *is* number `3 + i` of this process: exactly as sd_listen_fds(3) hands them over. So a child needs
//! nothing moved, and numbers cannot collide. Names and numbers lie in memory that was allocated at the start.

use std::os::fd::RawFd;

use crate::protocol::{NAME_MAX, is_name};

/// Number of the first descriptor that is handed over.
pub const FIRST: RawFd = 3;
/// Longest one variable of the environment may be, its name and the zero at its end included (MAX_ARG_STRLEN of the kernel).
const VARIABLE_MAX: usize = 128 * 1024;
/// How the variable begins that hands over the names.
const VARIABLE: &[u8] = b"LISTEN_FDNAMES=";
/// Most descriptors that can be held: `LISTEN_FDNAMES` has no room for more names, even if each were a colon alone.
pub const DESCRIPTORS_MAX: usize = VARIABLE_MAX - VARIABLE.len() - 1;

/// Moves and closes descriptors; the table itself decides only which.
pub trait Numbers {
    /// Has the descriptor `from` under the number `to`, whatever was there, and no longer under `from`.
    fn rename(&mut self, from: RawFd, to: RawFd) -> bool;
    /// Closes it.
    fn close(&mut self, fd: RawFd);
}

/// Why a descriptor is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// As many are held as may be.
    Descriptors,
    /// Their names have no more room in one variable of the environment.
    Names,
    /// It could not be brought to its number.
    Number,
}

impl Full {
    /// In words.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Full::Descriptors => "as many descriptors are held as may be",
            Full::Names => "the names of all descriptors would exceed 128 KiB",
            Full::Number => "the descriptor could not be brought to its number",
        }
    }
}

#[derive(Clone, Copy)]
struct Name {
    length: u8,
    bytes: [u8; NAME_MAX],
}

/// Descriptors by name. A name may have several.
pub struct Table {
    names: Vec<Name>,
    /// Digests of the names, beside each other: what is looked through when one is removed.
    digests: Vec<u32>,
    capacity: usize,
    /// Bytes of all names with a colon for each.
    room_taken: usize,
    /// `LISTEN_FDNAMES=…`, made anew for each child.
    variable: Vec<u8>,
}

impl Table {
    /// One that holds up to `capacity` descriptors, at most [`DESCRIPTORS_MAX`].
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.min(DESCRIPTORS_MAX);
        Table {
            names: Vec::with_capacity(capacity),
            digests: Vec::with_capacity(capacity),
            capacity,
            room_taken: 0,
            variable: Vec::with_capacity(VARIABLE_MAX),
        }
    }

    /// How many descriptors are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether none is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// How many descriptors can be held.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The name of the descriptor with this number; none if it is not held.
    #[must_use]
    pub fn name(&self, fd: RawFd) -> Option<&[u8]> {
        let index = usize::try_from(fd.checked_sub(FIRST)?).ok()?;
        self.names.get(index).map(|name| &name.bytes[..name.length.into()])
    }

    /// Holds a descriptor under a name. The table owns it from here on: what cannot be held is closed.
    ///
    /// # Errors
    /// There is no room.
    pub fn put(&mut self, name: &[u8], fd: RawFd, numbers: &mut impl Numbers) -> Result<(), Full> {
        debug_assert!(is_name(name), "the protocol refuses other names");
        let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
        let name = &name[..length.into()];
        // Received into the lowest free number, it is where it belongs already, unless others came with it.
        let number = FIRST + RawFd::try_from(self.len()).expect("below DESCRIPTORS_MAX");
        let full = if self.len() == self.capacity {
            Some(Full::Descriptors)
        } else if self.room_taken + name.len() + 1 > DESCRIPTORS_MAX {
            Some(Full::Names)
        } else if fd != number && !numbers.rename(fd, number) {
            Some(Full::Number)
        } else {
            None
        };
        if let Some(full) = full {
            numbers.close(fd);
            return Err(full);
        }
        let mut bytes = [0; NAME_MAX];
        bytes[..name.len()].copy_from_slice(name);
        self.names.push(Name { length, bytes });
        self.digests.push(digest(name));
        self.room_taken += name.len() + 1;
        Ok(())
    }

    /// Lets go of every descriptor of this name; how many there were. The last ones take their numbers.
    pub fn remove(&mut self, name: &[u8], numbers: &mut impl Numbers) -> usize {
        let (wanted, mut from, mut removed) = (digest(name), 0, 0);
        while let Some(index) = self.digests[from..].iter().position(|digest| *digest == wanted).map(|at| at + from) {
            let found = &self.names[index];
            if &found.bytes[..found.length.into()] != name {
                from = index + 1;
                continue;
            }
            self.names.swap_remove(index);
            self.digests.swap_remove(index);
            self.room_taken -= name.len() + 1;
            removed += 1;
            let [hole, last] = [index, self.names.len()].map(|index| FIRST + RawFd::try_from(index).expect("held"));
            if hole == last {
                numbers.close(hole);
            } else {
                // Both numbers are open and below the limit: dup2(2) has nothing to fail at.
                assert!(numbers.rename(last, hole), "descriptor {last} cannot take the number of another");
            }
            from = index;
        }
        removed
    }

    /// The variable that hands the names over, with the zero at its end.
    pub fn variable(&mut self) -> &[u8] {
        self.variable.clear();
        self.variable.extend_from_slice(VARIABLE);
        for (index, name) in self.names.iter().enumerate() {
            if index > 0 {
                self.variable.push(b':');
            }
            self.variable.extend_from_slice(&name.bytes[..name.length.into()]);
        }
        self.variable.push(0);
        debug_assert!(self.variable.len() <= VARIABLE_MAX);
        &self.variable
    }
}

/// FNV-1a.
fn digest(name: &[u8]) -> u32 {
    name.iter().fold(0x811c_9dc5, |digest, byte| (digest ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests;

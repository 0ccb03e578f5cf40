//! Ledgers: memfds with two places for a record each, written in turn.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use warmswap_keeper::store::{Kept, Store};

use super::configuration::Configured;
use super::doing::{Deed, Doing};
use super::notes::{NOTES, Notes};

/// Most bytes of a record. What is not written takes no memory.
const PLACE: u64 = 1 << 20;
const MAGIC: &[u8; 4] = b"WSLG";
/// Magic, length, checksum of what follows, number.
const HEAD: usize = 20;

/// Two places for records. The newer whole one counts: a broker that is killed while it writes leaves the other.
#[derive(Debug)]
struct Places {
    file: OwnedFd,
    buffer: Vec<u8>,
}

impl Places {
    /// Places, and so many bytes behind them.
    fn new(name: &str, more: u64) -> io::Result<Self> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, 2 * PLACE + more)?;
        // Nobody who holds it can take the ground from under it.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Places { file, buffer: Vec::new() })
    }

    fn write(&mut self, number: u64, record: &impl Serialize) -> io::Result<usize> {
        self.buffer.clear();
        self.buffer.resize(HEAD, 0);
        serde_json::to_writer(&mut self.buffer, record)?;
        let length = self.buffer.len() - HEAD;
        if self.buffer.len() as u64 > PLACE {
            return Err(io::Error::other(format!("a record has {length} bytes, it may have {PLACE}")));
        }
        self.buffer[..4].copy_from_slice(MAGIC);
        self.buffer[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        self.buffer[12..20].copy_from_slice(&number.to_le_bytes());
        let sum = crc32fast::hash(&self.buffer[12..]);
        self.buffer[8..12].copy_from_slice(&sum.to_le_bytes());
        let at = number % 2 * PLACE;
        let written = rustix::io::pwrite(&self.file, &self.buffer, at)?;
        if written == self.buffer.len() { Ok(written) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// What lies behind them.
    fn notes(&self) -> io::Result<Notes> {
        Ok(Notes::new(self.file.try_clone()?, 2 * PLACE))
    }

    /// The newest whole record, and its number.
    fn read(file: BorrowedFd<'_>) -> Option<(u64, Vec<u8>)> {
        let place = |at: u64| {
            let mut head = [0; HEAD];
            (rustix::io::pread(file, &mut head, at).ok()? == HEAD && head.starts_with(MAGIC)).then_some(())?;
            let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
            let length = word(4) as usize;
            (HEAD as u64 + length as u64 <= PLACE).then_some(())?;
            let mut rest = vec![0; HEAD - 12 + length];
            (rustix::io::pread(file, &mut rest, at + 12).ok()? == rest.len()).then_some(())?;
            (crc32fast::hash(&rest) == word(8)).then_some(())?;
            let number = u64::from_le_bytes(rest[..8].try_into().expect("eight bytes"));
            Some((number, rest.split_off(8)))
        };
        [place(0), place(PLACE)].into_iter().flatten().max_by_key(|(number, _)| *number)
    }
}

/// Which descriptors are the ledgers: the first thing that is in the store.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Directory {
    number: u64,
    /// Ledger and counter of each device, by name.
    devices: BTreeMap<String, (u32, u32)>,
    configured: Configured,
}

/// What a predecessor has left of one device.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) ledger: Ledger,
    /// The record, as it was written.
    pub(crate) record: Vec<u8>,
    /// Whether what its outbox says up to the counter was done.
    pub(crate) done: bool,
}

/// The store, and what this process has in it.
#[derive(Debug)]
pub(crate) struct Keeping {
    store: Store,
    doing: Doing,
    places: Places,
    directory: Directory,
    /// What was inherited and not asked for yet.
    inherited: HashMap<u32, OwnedFd>,
    left: BTreeMap<String, (u32, u32)>,
}

impl Keeping {
    /// Takes over what lies in the store, if there is a store.
    ///
    /// # Errors
    /// The system refuses a descriptor, or the store does not take one.
    pub(crate) fn begin() -> io::Result<Option<Rc<RefCell<Self>>>> {
        let Some(mut store) = Store::from_env()? else { return Ok(None) };
        crate::cgroup::belong_to_keeper();
        let mut inherited = HashMap::new();
        for (name, fd) in store.take_inherited() {
            // What has another name is not ours: a socket that systemd listens on, for example.
            if let Some(kept) = Kept::from_name(&name) {
                inherited.insert(kept.number(), fd);
            }
        }
        let before = inherited.get(&0).and_then(|file| Places::read(file.as_fd()));
        let before: Directory = before.and_then(|(_, bytes)| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let places = match inherited.remove(&0) {
            Some(file) => {
                store.adopt(&name_of(0), file.as_fd())?;
                Places { file, buffer: Vec::new() }
            }
            None => {
                let places = Places::new("warmswap-directory", 0)?;
                let kept = store.put(places.file.as_fd())?;
                assert_eq!(kept.number(), 0, "the directory is the first thing in the store");
                places
            }
        };
        let Directory { number, devices: left, configured } = before;
        let directory = Directory { number, devices: BTreeMap::new(), configured };
        let keeping = Keeping { store, doing: Doing::new(), places, directory, inherited, left };
        Ok(Some(Rc::new(RefCell::new(keeping))))
    }

    /// Names of the devices that a predecessor has left.
    pub(crate) fn left(&self) -> Vec<String> {
        self.left.keys().cloned().collect()
    }

    /// What a predecessor has left of this device.
    pub(crate) fn take(&mut self, device: &str) -> Option<Taken> {
        let (ledger, counter) = self.left.remove(device)?;
        let taken = Ledger::resume(self.adopt(ledger)?, self.adopt(counter)?)?;
        self.directory.devices.insert(device.to_owned(), (ledger, counter));
        Some(taken)
    }

    pub(super) fn configured(&mut self) -> &mut Configured {
        &mut self.directory.configured
    }

    /// One more reference to a descriptor that a predecessor has left.
    pub(super) fn adopt(&mut self, name: u32) -> Option<OwnedFd> {
        let fd = self.inherited(name)?;
        self.store.adopt(&name_of(name), fd.as_fd()).ok()?;
        Some(fd)
    }

    /// A descriptor that a predecessor has left.
    pub(crate) fn inherited(&mut self, name: u32) -> Option<OwnedFd> {
        // One description may stand in for several.
        self.inherited.get(&name)?.try_clone().ok()
    }

    /// Something that a predecessor has left and written nothing about, and the name that it has from now on.
    pub(crate) fn stray(&mut self, is: impl Fn(BorrowedFd<'_>) -> bool) -> Option<(u32, OwnedFd)> {
        let unclaimed = |name: u32| Kept::from_number(name).is_some_and(|kept| self.store.references(kept).is_none());
        let found =
            self.inherited.iter().find(|(name, fd)| unclaimed(**name) && is(fd.as_fd())).map(|(name, _)| *name)?;
        self.adopt(found).map(|fd| (found, fd))
    }

    /// A ledger for a device that has none.
    pub(crate) fn open(&mut self, device: &str) -> io::Result<Ledger> {
        let ledger = Ledger::new()?;
        let names = (self.put(ledger.places.file.as_fd())?, self.put(ledger.counter.as_fd())?);
        self.directory.devices.insert(device.to_owned(), names);
        self.write_directory()?;
        Ok(ledger)
    }

    /// All devices have been taken over: what nobody has asked for is let go of.
    pub(crate) fn settle(&mut self) -> io::Result<()> {
        self.left.clear();
        self.accept_configuration();
        self.write_directory()?;
        let unclaimed: Vec<u32> = std::mem::take(&mut self.inherited).into_keys().collect();
        let unclaimed = unclaimed
            .into_iter()
            .filter(|name| Kept::from_number(*name).is_some_and(|it| self.store.references(it).is_none()));
        let names: Vec<u32> = unclaimed.collect();
        names.iter().try_for_each(|name| self.store.discard(&name_of(*name)))
    }

    pub(super) fn write_directory(&mut self) -> io::Result<()> {
        self.directory.number += 1;
        // What nobody has asked for yet is still there for the next process, should this one end before somebody does.
        let mut left = std::mem::take(&mut self.left);
        self.directory.devices.append(&mut left.clone());
        let written = self.places.write(self.directory.number, &self.directory).map(drop);
        self.directory.devices.retain(|name, _| !left.contains_key(name));
        self.left.append(&mut left);
        written
    }

    /// Puts a descriptor into the store and says under which name it lies there.
    pub(crate) fn put(&mut self, fd: BorrowedFd<'_>) -> io::Result<u32> {
        self.store.put(fd).map(Kept::number)
    }

    /// Does deeds.
    pub(crate) fn perform(&mut self, deeds: &[Deed<'_>]) -> Vec<i32> {
        self.doing.all(deeds)
    }

    /// A device is not kept any more: what is written of it is not true any longer.
    pub(crate) fn forget(&mut self, device: &str) {
        if let Some((ledger, counter)) = self.directory.devices.remove(device) {
            // The directory is small, and was written before: what fails now would fail for the next broker, too.
            let _unwritten = self.write_directory();
            self.let_go(ledger);
            self.let_go(counter);
        }
    }

    /// Tells whoever has started this process that it works.
    pub(crate) fn ready(&mut self) {
        // A service manager that has gone away misses nothing.
        let _gone = self.store.ready();
    }

    pub(crate) fn let_go(&mut self, name: u32) {
        // What cannot be taken out of the store stays in it, and is found to be wanted by nobody by the next broker.
        let _stays = Kept::from_number(name).map(|kept| self.store.let_go(kept));
    }
}

/// The ledger of one device.
#[derive(Debug)]
pub(crate) struct Ledger {
    places: Places,
    pub(crate) notes: Notes,
    counter: OwnedFd,
    /// Number of the last record, and so what the counter says when it was done.
    number: u64,
    /// Names in the last record.
    kept: Vec<u32>,
}

impl Ledger {
    fn new() -> io::Result<Self> {
        let places = Places::new("warmswap-ledger", NOTES)?;
        let counter = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let notes = places.notes()?;
        Ok(Ledger { places, notes, counter, number: 0, kept: Vec::new() })
    }

    /// Goes on with what a predecessor has written.
    fn resume(file: OwnedFd, counter: OwnedFd) -> Option<Taken> {
        let places = Places { file, buffer: Vec::new() };
        let (number, record) = Places::read(places.file.as_fd())?;
        let done = counted(counter.as_fd())? >= number;
        let notes = places.notes().ok()?;
        // What is not done yet is done, and counted, before anything else is written.
        Some(Taken { ledger: Ledger { places, notes, counter, number, kept: Vec::new() }, record, done })
    }

    /// Number of the next record.
    pub(crate) fn next(&self) -> u64 {
        self.number + 1
    }

    pub(crate) fn counter(&self) -> BorrowedFd<'_> {
        self.counter.as_fd()
    }

    /// The descriptors of the last record are in use again: those names, sorted, as often as they stand there.
    pub(crate) fn claim(&mut self, keeping: &mut Keeping, names: Vec<u32>) -> io::Result<()> {
        let claim = |name: &u32| keeping.adopt(*name).map(drop).ok_or_else(|| missing(*name));
        names.iter().try_for_each(claim)?;
        self.kept = names;
        Ok(())
    }

    /// The last record is done: what it does not mention any more goes from the store. `names` are sorted.
    pub(crate) fn let_go(&mut self, keeping: &mut Keeping, names: Vec<u32>) -> io::Result<()> {
        let mut now = names.iter().peekable();
        for name in std::mem::take(&mut self.kept) {
            while now.next_if(|it| **it < name).is_some() {}
            if now.next_if(|it| **it == name).is_none() {
                keeping.let_go(name);
            }
        }
        self.kept = names;
        Ok(())
    }

    /// Writes the next record.
    pub(crate) fn write(&mut self, record: &impl Serialize) -> io::Result<usize> {
        let size = self.places.write(self.number + 1, record)?;
        self.number += 1;
        Ok(size)
    }
}

fn name_of(number: u32) -> String {
    Kept::from_number(number).map_or_else(String::new, |kept| kept.to_string())
}

fn missing(name: u32) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("descriptor {} is not in the store", name_of(name)))
}

/// What a counter stands at, without taking it.
fn counted(counter: BorrowedFd<'_>) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", counter.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("eventfd-count:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The broker is killed; the next one goes on with its ledger.
    fn killed(ledger: Ledger) -> Taken {
        Ledger::resume(ledger.places.file, ledger.counter).expect("there is a record")
    }

    fn count(ledger: &Ledger) {
        rustix::io::write(&ledger.counter, &1_u64.to_ne_bytes()).expect("room");
    }

    #[test]
    fn a_record_is_done_when_it_was_counted_however_many_brokers_were_killed_before() {
        let mut ledger = Ledger::new().expect("memory");
        let mut expected = 0;
        // For each broker: how many records it does, and whether it is killed between a record and what that one says.
        for (records, undone) in [(1, true), (0, true), (1, true), (3, false), (0, false), (2, true), (1, false)] {
            for _ in 0..records {
                expected += 1;
                assert_eq!(ledger.next(), expected);
                ledger.write(&expected).expect("room");
                count(&ledger);
            }
            if undone {
                expected += 1;
                ledger.write(&expected).expect("room");
            }
            let taken = killed(ledger);
            assert_eq!((taken.record.as_slice(), taken.done), (expected.to_string().as_bytes(), !undone));
            ledger = taken.ledger;
            if undone {
                count(&ledger);
            }
        }
    }

    #[test]
    fn a_record_that_was_not_written_to_its_end_leaves_the_one_before_it() {
        let mut ledger = Ledger::new().expect("memory");
        for number in 1..=3_u64 {
            ledger.write(&number).expect("room");
            count(&ledger);
        }
        // Place 0 is that of the next one.
        ledger.places.write(4, &4).expect("room");
        rustix::io::pwrite(&ledger.places.file, b"torn", HEAD as u64).expect("room");
        let taken = killed(ledger);
        assert_eq!((taken.record.as_slice(), taken.done, taken.ledger.next()), (b"3".as_slice(), true, 4));
    }
}

//! In-flight regions of backends: made in time, fresh for whoever uses them next, and read when their owner has died.
//!
//! A region belongs to one backend and is never given to another. The canary has one of its own on each link: what it leaves there says
//! nothing of the guest's rings.

use warmswap_wire::inflight::{self, RegionError};
use warmswap_wire::{InflightDescription, Reply, Request};

use super::failover::place;
use super::{Pair, Step};
use crate::canary;
use crate::event::BackendId;
use crate::journal::Entry;
use crate::link::{Link, LinkState, Purpose, Region, named};
use crate::observer::Observer;
use crate::policy::RegionUse;

impl Pair {
    /// Whether what a ring owes is known although it could not be followed: the primary's region says it, and is believed.
    pub(super) fn region_is_trusted(&self) -> bool {
        let primary = self.primary.and_then(|id| self.link(id));
        self.config.region == RegionUse::Trust && primary.is_some_and(|it| matches!(it.region, Region::Set { .. }))
    }

    /// The victim's part of a region, as it left it, and the ring's size; none if it kept no region.
    fn read_region(&self, index: u32, step: &mut Step<'_>) -> Result<Option<(Vec<u8>, u16)>, String> {
        let victim = self.failover.as_ref().and_then(|failover| self.link(failover.victim));
        let Some(Region::Set { description, fd }) = victim.map(|link| link.region) else { return Ok(None) };
        let layout = self.rings[index as usize].observer.as_ref().map(|observer| observer.layout());
        let size = layout.map_or(0, warmswap_wire::ring::Layout::size);
        let stride = description.mmap_size / u64::from(description.num_queues.max(1));
        let length = inflight::HEADER_BYTES + inflight::ENTRY_BYTES * u64::from(size);
        if length > stride || u64::from(index) >= u64::from(description.num_queues) {
            return Err("the in-flight region has no room for this ring".to_owned());
        }
        let at = description.mmap_offset.saturating_add(stride.saturating_mul(u64::from(index)));
        let bytes = step.memory.read_region(fd, at, length).ok_or("the in-flight region cannot be read")?;
        Ok(Some((bytes, size)))
    }

    /// Asks the second witness, where the victim kept an in-flight region: it marks what had been taken from the ring, so it may know
    /// less than the ring, but nothing else.
    pub(super) fn ask_region(&self, index: u32, used: u16, heads: &[u16], step: &mut Step<'_>) -> Result<(), String> {
        let Some((bytes, size)) = self.read_region(index, step)? else { return Ok(()) };
        let region = match inflight::read_split(&bytes, size, used) {
            Ok(region) => region,
            Err(error) => {
                // One that was never used, or not since the ring was handed over, has nothing to say; the ring is exact by itself.
                let entry = Entry::warning("WitnessSilent").with("ring", index).with("reason", error.to_string());
                step.out.journal(entry.with("next", "the ring alone is believed"));
                return Ok(());
            }
        };
        match region.heads.iter().find(|head| !heads.contains(head)) {
            Some(head) => Err(format!("the in-flight region marks head {head}, which the rings show as completed")),
            None => Ok(()),
        }
    }

    /// Takes from the dead victim's region what following the ring could not tell: requests it had taken, by their counters, and behind
    /// them what nobody had taken yet, by the ring itself. The slots from `used.idx` on say so afterwards, and knowledge is exact again.
    ///
    /// # Errors
    /// There is no region that is believed, or it does not agree with the ring.
    pub(super) fn learn_from_region(&mut self, index: u32, step: &mut Step<'_>) -> Result<(), String> {
        let Some((bytes, size)) = self.read_region(index, step)? else {
            return Err("the backend kept no in-flight region".to_owned());
        };
        let (used, avail) = (step.memory.used_idx(index), step.memory.avail_idx(index));
        let owed = avail.wrapping_sub(used);
        let mut heads = match inflight::read_split(&bytes, size, used) {
            Ok(region) => region.heads,
            // It had not begun with the ring.
            Err(RegionError::Version { found: 0 }) => Vec::new(),
            Err(error) => return Err(error.to_string()),
        };
        let taken = u16::try_from(heads.len()).expect("at most as many as the ring has entries");
        if owed > size || taken > owed {
            return Err(format!("the in-flight region marks {taken} requests, avail.idx - used.idx is {owed}"));
        }
        let layout = self.rings[index as usize].observer.as_ref().expect("waiting rings are observed").layout();
        for at in taken..owed {
            let head = step.memory.avail_slot(index, layout.slot(used.wrapping_add(at)));
            if head >= size || heads.contains(&head) {
                return Err(format!("head {head} was submitted and is in flight by the in-flight region"));
            }
            heads.push(head);
        }
        if self.config.survivors == crate::policy::Survivors::Refuse {
            return Err("survivors would have to be written to the available ring, which is switched off".to_owned());
        }
        place(index, layout, used, &heads, step);
        let mut observer = Observer::new(layout, used, step.now);
        observer.observe(step.now, index, step.memory);
        self.rings[index as usize].observer = Some(observer);
        step.out.journal(Entry::info("RegionBelieved").with("ring", index).with("taken", taken).with("owed", owed));
        Ok(())
    }

    /// Whether a canary can begin as far as regions are concerned: one that tracks what is in flight needs a region for it, which is asked
    /// for if need be, and is made fresh.
    pub(super) fn canary_has_region(&mut self, backend: BackendId, step: &mut Step<'_>) -> bool {
        let Some(link) = self.links.iter_mut().find(|link| link.id == backend) else { return true };
        if !link.tracks_in_flight() {
            return true;
        }
        let Region::Set { description, fd } = link.canary_region else {
            if link.canary_region == Region::None {
                link.canary_region = Region::Asked;
                let (num_queues, queue_size) = (1, canary::RING_SIZE);
                let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
                link.ask(&Request::GetInflightFd(wanted), Purpose::CanaryRegion, step.out);
            }
            return false;
        };
        let length = usize::try_from(description.mmap_size).unwrap_or(0).min(REGION_MAX);
        // What the last one left says nothing of this one.
        let fresh = step.memory.write_private(fd, description.mmap_offset, &vec![0; length]);
        link.canary.possible &= fresh;
        fresh
    }

    /// The region for a link's canary has been made: what waited for it goes on.
    pub(super) fn canary_region_made(&mut self, backend: BackendId, reply: &Reply, step: &mut Step<'_>) {
        let Reply::Inflight { region, fd: Some(fd) } = reply else {
            return self.backend_lost(backend, "it offers in-flight tracking and makes no region", step);
        };
        let Some(link) = self.link_mut(backend) else { return };
        let description = named(*region, 1, canary::RING_SIZE);
        link.canary_region = Region::Set { description, fd: *fd };
        if link.state == LinkState::Warming {
            self.warmed(backend, step);
        }
    }
}

/// Most bytes of a region for one small ring, whatever its maker says.
const REGION_MAX: usize = 1 << 16;

impl Link {
    /// A canary begins: its region is in force.
    pub(super) fn lend_region(&mut self, out: &mut crate::event::Actions) {
        if let Region::Set { description, fd } = self.canary_region {
            self.tell(&Request::SetInflightFd { region: description, fd }, out);
        }
    }

    /// The canary is over: the guest's own region is in force again.
    pub(super) fn restore_region(&mut self, out: &mut crate::event::Actions) {
        if let Region::Set { description, fd } = self.region {
            self.tell(&Request::SetInflightFd { region: description, fd }, out);
        }
    }
}

//! What the control thread tells the sampler of a device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use warmswap_core::{BackendId, Pair};

use super::backends::Backend;
use crate::config::DeviceConfig;
use crate::profile::feed::RingFeed;
use crate::profile::sampler::{DeviceFeed, Teller, Told};
use crate::profile::source::Subject;
use crate::shm::SharedMemory;

/// Rings of one device that are measured.
const RINGS_MAX: usize = 1024;
/// Files of one backend whose storage is measured.
const IMAGES_MAX: usize = 4;

/// See the module.
pub(super) struct Reporter {
    number: u16,
    teller: Teller,
    feed: Arc<DeviceFeed>,
    rings: Vec<Option<Arc<RingFeed>>>,
    /// Changes of the memory, and event indices, as they were told last.
    view: Option<(u64, bool)>,
    /// The backend that serves, as it was told last.
    serving: Option<BackendId>,
}

impl Reporter {
    /// Tells of the device itself.
    pub(super) fn new(number: u16, config: &DeviceConfig, mut teller: Teller) -> Self {
        let feed = Arc::new(DeviceFeed::default());
        let (name, device) = (config.name.as_str().into(), config.pair.device);
        teller.tell(Told::Device { number, name, device, feed: Arc::clone(&feed) });
        Reporter { number, teller, feed, rings: Vec::new(), view: None, serving: None }
    }

    /// Publishes what was counted, and tells what has changed, but not while a failover runs: to tell wakes another thread.
    pub(super) fn report(&mut self, pair: &Pair, memory: &SharedMemory, backends: &[Backend]) {
        let fails_over = pair.is_failing_over();
        for (index, meter) in pair.meters().filter(|(_, meter)| meter.looks > 0).take(RINGS_MAX) {
            let at = index as usize;
            if self.rings.len() <= at {
                self.rings.resize(at + 1, None);
            }
            if self.rings[at].is_none() && !fails_over {
                let feed = Arc::new(RingFeed::default());
                self.teller.tell(Told::Ring { number: self.number, index, feed: Arc::clone(&feed) });
                self.rings[at] = Some(feed);
            }
            if let Some(feed) = &self.rings[at] {
                feed.publish(meter);
            }
        }
        if fails_over {
            return;
        }
        let micros = |span: Option<warmswap_core::Nanos>| span.map_or(0, |span| span.0.max(1));
        self.feed.round_trip_ns.store(micros(pair.round_trip()), Ordering::Relaxed);
        self.feed.canary_ns.store(micros(pair.canary()), Ordering::Relaxed);
        let view = (memory.changes(), pair.has_event_idx());
        if self.view != Some(view) && self.feed.show(memory.view(), view.1) {
            self.view = Some(view);
        }
        if self.serving != pair.primary() {
            self.tell_serving(pair.primary(), backends);
        }
        self.teller.retry();
    }

    /// The serving backend is told of when it is known what it does its I/O on.
    fn tell_serving(&mut self, primary: Option<BackendId>, backends: &[Backend]) {
        let Some(id) = primary else {
            self.serving = None;
            return;
        };
        let Some(backend) = backends.iter().find(|backend| backend.id == id) else { return };
        let (Some(process), Some(storage)) = (&backend.process, &backend.storage) else { return };
        if storage.last_look().is_none() {
            return;
        }
        let known = process.subject();
        let files = storage.files().take(IMAGES_MAX).collect();
        let subject = Subject { pid: known.pid, pidfd: process.shared_pidfd(), group: known.group, images: Vec::new() };
        self.serving = Some(id);
        self.teller.tell(Told::Serving { number: self.number, backend: id.0, subject: Some(subject), files });
    }

    /// What was measured lately is worth keeping.
    pub(super) fn freeze(&mut self, reason: &str) {
        self.teller.tell(Told::Freeze { number: self.number, reason: reason.to_owned() });
    }
}

//! Backends: coming, negotiating, warming, going.

use warmswap_wire::{
    BackendRequest, FdSlot, Header, HeaderFlags, ProtocolFeatures, Reply, Request, VringFd, VringState,
};
use warmswap_zoo::{Animal, loose};

use super::{Pair, Step};
use crate::canary::CanaryState;
use crate::event::{Action, Actions, BackendId, PrivateEvents, earliest};
use crate::failover::{Kind, Phase};
use crate::journal::Entry;
use crate::link::{Answered, LinkState, Offer, Purpose};
use crate::memory::private_region;
use crate::policy::Limits;
use crate::time::Nanos;

impl Pair {
    pub(crate) fn link_up(
        &mut self,
        backend: BackendId,
        backend_req: Option<FdSlot>,
        private: PrivateEvents,
        step: &mut Step<'_>,
    ) {
        let now = step.now;
        match self.link_mut(backend) {
            Some(link) if link.state == LinkState::Starting => {
                link.connected(backend_req, private, now, step.out);
            }
            // Given up in the meantime.
            _ => {
                let fds = backend_req.into_iter().chain([private.kick, private.call, private.probe]);
                fds.for_each(|fd| step.out.push(Action::Close(fd)));
            }
        }
    }

    pub(crate) fn link_message(
        &mut self,
        backend: BackendId,
        header: &Header,
        payload: &[u8],
        fds: &[FdSlot],
        step: &mut Step<'_>,
    ) {
        let (device, now) = (self.config.device, step.now);
        let Some(link) = self.link_mut(backend) else {
            fds.iter().for_each(|fd| step.out.push(Action::Close(*fd)));
            return;
        };
        match link.message(device, header, payload, fds, now, step.out) {
            Ok(Answered::Nothing) => {}
            Ok(Answered::Offered) => self.offered(backend, step),
            Ok(Answered::For(purpose, reply)) => self.answered(backend, purpose, &reply, step),
            Err(error) => {
                fds.iter().for_each(|fd| step.out.push(Action::Close(*fd)));
                self.counters.protocol_errors += 1;
                self.backend_lost(backend, &format!("it broke the protocol: {error}"), step);
            }
        }
    }

    fn answered(&mut self, backend: BackendId, purpose: Purpose, reply: &Reply, step: &mut Step<'_>) {
        let value = if let Reply::U64(value) = reply { *value } else { 0 };
        match purpose {
            Purpose::Warm => self.warmed(backend, step),
            Purpose::Mirror(number) => self.mirrored(backend, number, value, step),
            Purpose::Divert => self.diverted(backend, step),
            Purpose::Stop { ring } => {
                if let Reply::VringState(VringState { index, value }) = reply {
                    self.stop_answered(backend, ring, *index, *value, step);
                }
            }
            Purpose::Handed => self.handed(backend, value, step),
            Purpose::Enabled => self.rings_enabled(backend, value, step),
            Purpose::Called { ring } => self.ring_called(backend, ring, step),
            Purpose::Canary => self.canary_stopped(backend, step),
            Purpose::Isolated => self.isolation_acknowledged(backend, step),
            Purpose::Inflight => self.region_made(backend, reply, step),
            Purpose::CanaryRegion => self.canary_region_made(backend, reply, step),
            Purpose::State => self.state_channel_taken(backend, reply, step),
            Purpose::StateCheck => self.state_checked(backend, value, step),
            Purpose::ConfigAgain => {
                if let Reply::Config(Some(config)) = reply {
                    self.config_read(backend, config.bytes.clone(), step);
                }
            }
            _ => {}
        }
    }

    /// A backend has made its in-flight region. Rings that waited for it can be given now.
    fn region_made(&mut self, backend: BackendId, reply: &Reply, step: &mut Step<'_>) {
        let Reply::Inflight { region, fd: Some(fd) } = reply else {
            return self.backend_lost(backend, "it offers in-flight tracking and makes no region", step);
        };
        let Some(link) = self.link_mut(backend) else { return };
        link.region_made(*region, *fd, step.out);
        self.rings_may_be_given(step);
    }

    /// A backend is known. The first ones fix what the VMM is offered; later ones must match it.
    fn offered(&mut self, backend: BackendId, step: &mut Step<'_>) {
        if self.offer.is_none() {
            self.try_open(step);
            return;
        }
        self.admit(backend, step);
    }

    /// Fixes the offer once every backend that was started has offered or failed.
    fn try_open(&mut self, step: &mut Step<'_>) {
        let undecided = |link: &&crate::link::Link| {
            matches!(link.state, LinkState::Starting | LinkState::Negotiating)
                && step.now.since(link.started_at) < self.config.limits.start_max
        };
        if self.links.iter().any(|link| undecided(&link)) {
            return;
        }
        let offers: Vec<(BackendId, Offer)> = self
            .links
            .iter()
            .filter(|link| link.state == LinkState::Offered)
            .map(|link| (link.id, link.offer.clone()))
            .collect();
        let Some((first, mut offer)) = offers.first().cloned() else { return };
        if self.primary != Some(first) {
            self.primary = Some(first);
            self.shadow = None;
            step.out.push(Action::Assign { backend: first, primary: true });
        }
        let device = self.config.device;
        // One that presents another device is refused below; it must not shrink what is offered.
        for (_, other) in offers[1..].iter().filter(|(_, other)| is_same_config(&other.config, &offers[0].1.config)) {
            offer.features &= if loose(Animal::FeaturesDiffer) { u64::MAX } else { other.features };
            offer.protocol &= other.protocol;
            offer.queues = offer.queues.min(other.queues);
            offer.mem_slots = offer.mem_slots.min(other.mem_slots);
        }
        offer.features &= device.virtio_features();
        offer.protocol &= device.protocol_features().bits();
        self.offer = Some(offer);
        for (id, _) in offers {
            self.admit(id, step);
        }
    }

    /// Lets a backend into the pair, or says what is wrong with it.
    fn admit(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let Some(offer) = &self.offer else { return };
        let Some(link) = self.links.iter_mut().find(|link| link.id == backend) else { return };
        self.session.take_out_writes(&mut link.offer.config, &offer.config);
        let protocol = offer.protocol & !ProtocolFeatures::REPLY_ACK.bits();
        let wanted = Offer { protocol, ..offer.clone() };
        if let Some(difference) = difference(&wanted, &link.offer).or_else(|| self.state_refusal(backend)) {
            self.refuse_backend(backend, &difference, step);
            return;
        }
        if self.session.can_warm() {
            self.warm(backend, step);
        } else {
            self.ready(backend, step);
        }
    }

    fn refuse_backend(&mut self, backend: BackendId, difference: &str, step: &mut Step<'_>) {
        let shadow = self.shadow == Some(backend);
        step.out.journal(
            Entry::error("ShadowRefused")
                .with("backend", backend.0)
                .with("reason", difference)
                .with("next", "the device runs unprotected; another start is tried with back-off"),
        );
        if shadow {
            self.lose_shadow(backend, &format!("refused: {difference}"), step);
        } else {
            self.backend_lost(backend, &format!("refused: {difference}"), step);
        }
    }

    /// Replays the session to a backend: everything except what starts a ring.
    fn warm(&mut self, backend: BackendId, step: &mut Step<'_>) {
        self.give_private_memory(backend, step);
        let Some(link) = self.link(backend) else { return };
        let mut script = vec![Request::SetFeatures(self.link_features())];
        let slots = link.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let mut memory = self.session.memory.clone();
        memory.extend(link.private_memory.map(|fd| (private_region(), fd)));
        if slots {
            let add = |(region, fd): &(_, FdSlot)| Request::AddMemReg { region: *region, fd: Some(*fd) };
            script.extend(memory.iter().map(add));
        } else if !memory.is_empty() {
            script.push(Request::SetMemTable(memory));
        }
        script.extend(self.session.log.map(|(region, fd)| Request::SetLogBase { region, fd: Some(fd) }));
        script.extend(self.session.log_fd.map(Request::SetLogFd));
        let written = self.session.config_writes.iter().filter(|_| !loose(Animal::WriteCacheForgotten));
        script.extend(written.cloned().map(Request::SetConfig));
        script.extend(self.session.mtu.map(Request::NetSetMtu));
        for (index, ring) in (0_u32..).zip(&self.session.rings) {
            let fd = |fd| VringFd { index, fd: Some(fd) };
            script.extend(ring.size.map(|value| Request::SetVringNum(VringState { index, value })));
            script.extend(ring.call.map(|call| Request::SetVringCall(fd(call))));
            script.extend(ring.err.map(|err| Request::SetVringErr(fd(err))));
            script.extend(ring.addr.filter(|_| loose(Animal::AddressEarly)).map(Request::SetVringAddr));
            script.extend(ring.kick.filter(|_| loose(Animal::EarlyKick)).map(|kick| Request::SetVringKick(fd(kick))));
        }
        let now = step.now;
        let Some(link) = self.link_mut(backend) else { return };
        if link.state == LinkState::Ready {
            // What took its time before was the VMM.
            link.started_at = now;
        }
        link.state = LinkState::Warming;
        link.warmed = true;
        link.warming_at = now;
        for request in &script {
            link.tell(request, step.out);
        }
        link.ask(&Request::GetFeatures, Purpose::Warm, step.out);
    }

    /// The session has just become complete enough: everybody who waits is warmed.
    pub(crate) fn warm_all(&mut self, step: &mut Step<'_>) {
        if !self.session.can_warm() {
            return;
        }
        let waiting: Vec<BackendId> =
            self.links.iter().filter(|link| link.state == LinkState::Ready).map(|link| link.id).collect();
        waiting.into_iter().for_each(|id| self.warm(id, step));
    }

    pub(super) fn warmed(&mut self, backend: BackendId, step: &mut Step<'_>) {
        if self.link(backend).is_none_or(|link| link.state != LinkState::Warming) {
            return;
        }
        if self.wants_first_canary(backend) && self.begin_canary(backend, step) {
            return;
        }
        self.ready(backend, step);
    }

    pub(crate) fn ready(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let now = step.now;
        let Some(link) = self.link_mut(backend) else { return };
        link.state = LinkState::Ready;
        let took = now.since(link.started_at);
        if self.shadow == Some(backend) {
            self.restart_wait = self.config.limits.restart_min;
            self.shadow_note = "ready".to_owned();
            let entry = Entry::info("ShadowReady").with("backend", backend.0);
            step.out.journal(entry.with("took_us", crate::journal::Value::Micros(took.as_micros())));
            if self.session.started().next().is_some() {
                // Made now, not when every microsecond counts.
                self.has_region(backend, step);
            }
            self.shadow_became_ready(step);
            self.promote_instead_of_waiting(step);
        }
        if self.primary == Some(backend) {
            let entry = Entry::info("PrimaryReady").with("backend", backend.0);
            step.out.journal(entry.with("took_us", crate::journal::Value::Micros(took.as_micros())));
            self.serve_waiting_rings(step);
        }
    }

    /// A shadow that is ready before a primary that has served nothing yet takes its place: the guest need not wait for a slow
    /// start.
    fn promote_instead_of_waiting(&mut self, step: &mut Step<'_>) {
        if self.failover.is_some() || self.closing {
            return;
        }
        let waiting = |link: &crate::link::Link| {
            !matches!(link.state, LinkState::Ready | LinkState::Active | LinkState::Ended) && !link.touched
        };
        let (Some(slow), Some(ready)) = (self.primary, self.shadow) else { return };
        if !self.link(slow).is_some_and(waiting) {
            return;
        }
        self.primary = Some(ready);
        self.shadow = Some(slow);
        self.shadow_note = "starting".to_owned();
        step.out.push(Action::Assign { backend: ready, primary: true });
        step.out.push(Action::Assign { backend: slow, primary: false });
    }

    /// A backend's link or process is gone, whatever the reason.
    pub(crate) fn backend_lost(&mut self, backend: BackendId, reason: &str, step: &mut Step<'_>) {
        let Some(link) = self.link_mut(backend) else { return };
        if link.state == LinkState::Ended {
            return;
        }
        let early = !matches!(link.state, LinkState::Ready | LinkState::Active);
        let touched = link.touched;
        link.end(step.out);
        // One that serves is fenced, and waited for until then: the end of its link is not its own.
        if !touched {
            self.stop_waiting_for(backend, step);
        }
        if self.offer.is_none() {
            self.start_failed(backend, reason, step);
        } else if self.failover.as_ref().is_some_and(|failover| failover.victim == backend) {
            self.victim_lost(step);
        } else if self.failover.as_ref().is_some_and(|failover| failover.target == Some(backend)) {
            self.target_lost(reason, step);
        } else if self.primary == Some(backend) {
            step.out.journal(
                Entry::warning("PrimaryLost")
                    .with("backend", backend.0)
                    .with("reason", reason)
                    .with("next", "failing over"),
            );
            self.begin_failover(Kind::Crash, reason.to_owned(), backend, None, false, step);
        } else {
            self.lose_shadow_because(backend, reason, early, step);
        }
    }

    pub(crate) fn lose_shadow(&mut self, backend: BackendId, reason: &str, step: &mut Step<'_>) {
        self.stop_waiting_for(backend, step);
        self.lose_shadow_because(backend, reason, true, step);
    }

    /// The shadow is gone. One that never worked is started again with back-off, one that did at once.
    fn lose_shadow_because(&mut self, backend: BackendId, reason: &str, early: bool, step: &mut Step<'_>) {
        step.out.push(Action::Retire { backend });
        self.forget_backend(backend, step.out);
        if self.primary == Some(backend) && self.failover.is_none() && !loose(Animal::RoleKept) {
            // It was the shadow when it began to read, and has served nothing since: the role is free.
            self.primary = None;
            let entry = Entry::warning("PrimaryLost").with("backend", backend.0).with("reason", reason);
            step.out.journal(entry.with("next", "another one takes its place"));
        }
        if self.shadow != Some(backend) {
            return;
        }
        self.shadow = None;
        self.shadow_note = reason.to_owned();
        self.counters.shadows_lost += 1;
        let wait = if early { self.restart_wait } else { Nanos(0) };
        if early {
            let doubled = Nanos(self.restart_wait.0.saturating_mul(2));
            self.restart_wait = doubled.min(self.config.limits.restart_max);
        }
        self.restart_at = Some(step.now + wait);
        step.out.journal(
            Entry::warning("ShadowLost")
                .with("backend", backend.0)
                .with("reason", reason)
                .with("next", format!("another one is started in {wait}")),
        );
    }

    /// A backend failed before the VMM was ever offered anything.
    fn start_failed(&mut self, backend: BackendId, reason: &str, step: &mut Step<'_>) {
        step.out.push(Action::Retire { backend });
        self.forget_backend(backend, step.out);
        step.out.journal(Entry::error("BackendFailed").with("backend", backend.0).with("reason", reason));
        if self.shadow == Some(backend) {
            self.shadow = None;
            self.shadow_note = reason.to_owned();
            self.restart_at = Some(step.now + self.restart_wait);
        }
        if self.primary == Some(backend) {
            self.primary = None;
        }
        if self.links.is_empty() {
            self.failed = Some(reason.to_owned());
        } else {
            self.try_open(step);
        }
    }

    pub(crate) fn poll_links(&mut self, step: &mut Step<'_>) {
        let limits = self.config.limits;
        let (serving, completed_at) = self.last_completion();
        let mut silent = None;
        for link in &mut self.links {
            let starting = matches!(link.state, LinkState::Starting | LinkState::Negotiating);
            if starting && step.now.since(link.started_at) > limits.start_max {
                silent = Some((link.id, format!("it was not ready within {}", limits.start_max)));
            }
            let replaying = link.state == LinkState::Warming && link.canary.state != CanaryState::Reading;
            if replaying && step.now.since(link.warming_at) > limits.hang.max(limits.ping_every) {
                silent = Some((link.id, "it does not answer while the session is replayed to it".to_owned()));
            }
            if !matches!(link.state, LinkState::Ready | LinkState::Active) {
                continue;
            }
            if link.is_overrun() {
                silent = Some((link.id, "it reads its messages but answers none".to_owned()));
            }
            match link.pinged_at {
                Some(at) if step.now >= silent_at(at, completed_at.filter(|_| serving == Some(link.id)), &limits) => {
                    let silence = step.now.since(at).to_the_millisecond();
                    silent = Some((link.id, format!("its control channel has been silent for {silence}")));
                }
                None if step.now.since(link.heard_at) >= limits.ping_every => link.ping(step.now, step.out),
                _ => {}
            }
        }
        if let Some((id, reason)) = silent {
            self.backend_silent(id, &reason, step);
        }
    }

    /// A living process that does not answer: hung.
    fn backend_silent(&mut self, backend: BackendId, reason: &str, step: &mut Step<'_>) {
        if self.primary == Some(backend) && self.failover.is_some() && self.state_is_at_stake().is_some() {
            // It may come back, and what it has cannot be had otherwise.
            let now = step.now;
            return self.link_mut(backend).into_iter().for_each(|link| link.ask_again(now));
        }
        let takes_over = self.failover.as_ref().is_some_and(|failover| failover.target == Some(backend));
        if takes_over && self.is_patient(step) && self.exactness_refusal().is_some() && !loose(Animal::HangKilledBlind)
        {
            // It serves the rings already, and nobody would know what it owed.
            let now = step.now;
            return self.link_mut(backend).into_iter().for_each(|link| link.ask_again(now));
        }
        let failing = self.failover.as_ref();
        if failing.is_some_and(|failover| failover.victim == backend && failover.phase != Phase::Draining) {
            return;
        }
        if failing.is_none() && self.primary == Some(backend) && self.offer.is_some() {
            self.hang_found(backend, reason.to_owned(), step);
        } else {
            self.backend_lost(backend, reason, step);
        }
    }

    /// The backend that serves rings, and when it last completed something on one of them.
    fn last_completion(&self) -> (Option<BackendId>, Option<Nanos>) {
        let served = self.rings.iter().filter(|ring| ring.served);
        (self.serving(), served.filter_map(|ring| ring.completed_at).max())
    }

    pub(crate) fn next_link_check(&self) -> Option<Nanos> {
        let limits = &self.config.limits;
        let (serving, completed_at) = self.last_completion();
        self.links.iter().fold(None, |next, link| {
            let due = match link.state {
                LinkState::Starting | LinkState::Negotiating => link.started_at + limits.start_max,
                LinkState::Warming if link.canary.state == CanaryState::Reading => return next,
                LinkState::Warming => link.warming_at + limits.hang.max(limits.ping_every) + Nanos(1),
                LinkState::Ready | LinkState::Active => match link.pinged_at {
                    Some(at) => silent_at(at, completed_at.filter(|_| serving == Some(link.id)), limits),
                    None => link.heard_at + limits.ping_every,
                },
                LinkState::Offered | LinkState::Ended => return next,
            };
            earliest(next, Some(due))
        })
    }

    /// Roles that are empty are filled: the shadow becomes primary where there is none, a new shadow is started.
    pub(crate) fn fill_roles(&mut self, step: &mut Step<'_>) {
        if self.failover.is_some() || self.closing || self.ending || self.failed.is_some() {
            return;
        }
        if self.primary.is_none() {
            self.primary = match self.shadow.take() {
                Some(shadow) => {
                    step.out.push(Action::Assign { backend: shadow, primary: true });
                    Some(shadow)
                }
                None => Some(self.start_backend(step.now, true, step.out)),
            };
            self.serve_waiting_rings(step);
        }
        self.fill_shadow(step);
    }

    pub(crate) fn fill_shadow(&mut self, step: &mut Step<'_>) {
        if !self.config.shadow || self.shadow.is_some() || self.offer.is_none() {
            return;
        }
        match self.restart_at {
            Some(at) if at > step.now => {}
            _ => {
                self.restart_at = None;
                self.shadow_note = "starting".to_owned();
                self.shadow = Some(self.start_backend(step.now, false, step.out));
            }
        }
    }

    /// Fresh backends for the next session: the old ones hold the old guest's memory.
    pub(crate) fn recycle_backends(&mut self, step: &mut Step<'_>) {
        let ids: Vec<BackendId> = self.links.iter().filter(|link| link.warmed).map(|link| link.id).collect();
        for id in ids {
            step.out.push(Action::Retire { backend: id });
            self.forget_backend(id, step.out);
            if self.primary == Some(id) {
                self.primary = None;
            }
            if self.shadow == Some(id) {
                self.shadow = None;
                self.restart_at = None;
            }
        }
    }

    pub(crate) fn backend_request(
        &mut self,
        backend: BackendId,
        request: &BackendRequest,
        need_reply: bool,
        step: &mut Step<'_>,
    ) {
        match request {
            BackendRequest::ConfigChange => {
                if let Some(link) = self.link_mut(backend) {
                    link.read_config_again(step.out);
                }
            }
            other => {
                self.counters.refused_messages += 1;
                let name = BackendRequest::name_of(other.id()).unwrap_or("a back-end request");
                step.out.journal(
                    Entry::warning("MessageRefused")
                        .with("peer", "backend")
                        .with("backend", backend.0)
                        .with("request", name)
                        .with("reason", "it belongs to a feature that is masked"),
                );
                if let BackendRequest::VringHostNotifier { fd: Some(fd), .. } = other {
                    step.out.push(Action::Close(*fd));
                }
            }
        }
        if need_reply {
            let (mut bytes, mut fds) = (Vec::new(), Vec::new());
            Reply::U64(u64::from(*request != BackendRequest::ConfigChange)).encode(request.id(), &mut bytes, &mut fds);
            step.out.push(Action::SendLinkBackend { backend, bytes });
        }
    }

    /// A backend's configuration space was read again. The primary's change is the VMM's; the shadow must follow it.
    fn config_read(&mut self, backend: BackendId, mut config: Vec<u8>, step: &mut Step<'_>) {
        if let Some(offer) = &self.offer {
            self.session.take_out_writes(&mut config, &offer.config);
        }
        if let Some(link) = self.link_mut(backend) {
            link.offer.config.clone_from(&config);
        }
        if self.primary != Some(backend) {
            return self.compare_shadow(backend, step);
        }
        let Some(offer) = &mut self.offer else { return };
        if offer.config == config {
            return;
        }
        offer.config = config;
        step.out.journal(Entry::info("ConfigChanged").with("backend", backend.0));
        if let Some(channel) = self.session.backend_req.filter(|_| !loose(Animal::ConfigChangeSwallowed)) {
            notify_config_change(channel, step.out);
        }
        if let Some(shadow) = self.shadow.and_then(|id| self.link_mut(id)) {
            shadow.read_config_again(step.out);
        }
    }

    /// A shadow that presents another device than the guest knows must not take over: a fresh one sees what is there now.
    fn compare_shadow(&mut self, backend: BackendId, step: &mut Step<'_>) {
        let taking_over = self.failover.as_ref().is_some_and(|failover| failover.target == Some(backend));
        if self.shadow == Some(backend)
            && !taking_over
            && let Some(difference) = self.shadow_differs()
        {
            self.lose_shadow(backend, &difference, step);
        }
    }

    /// Whether the shadow still presents the very device the guest knows.
    pub(crate) fn shadow_differs(&self) -> Option<String> {
        let (offer, shadow) = (self.offer.as_ref()?, self.shadow.and_then(|id| self.link(id))?);
        (!is_same_config(&offer.config, &shadow.offer.config))
            .then(|| difference_of_config(&offer.config, &shadow.offer.config))
            .filter(|_| shadow.is_alive())
    }
}

fn notify_config_change(channel: FdSlot, out: &mut Actions) {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    BackendRequest::ConfigChange.encode(HeaderFlags::empty(), &mut bytes, &mut fds);
    out.push(Action::SendVmmBackend { channel, bytes });
}

/// What `other` lacks of what is `wanted`, as a sentence.
fn difference(wanted: &Offer, other: &Offer) -> Option<String> {
    if !is_same_config(&wanted.config, &other.config) {
        return Some(difference_of_config(&wanted.config, &other.config));
    }
    if other.queues < wanted.queues {
        return Some(format!("it serves {} rings, {} were offered to the VMM", other.queues, wanted.queues));
    }
    if other.mem_slots < wanted.mem_slots {
        return Some(format!("it takes {} memory regions, {} were offered", other.mem_slots, wanted.mem_slots));
    }
    let missing = wanted.features & !other.features;
    if missing != 0 && !loose(Animal::FeaturesDiffer) {
        return Some(format!("features {missing:#x} were offered to the VMM and it lacks them"));
    }
    let missing = wanted.protocol & !other.protocol;
    (missing != 0).then(|| {
        let names = ProtocolFeatures::from_bits_truncate(missing);
        format!("protocol features {names:?} were offered to the VMM and it lacks them")
    })
}

/// Whether two configuration spaces say the same. One may end where the other goes on with zeroes: what lies there belongs to features
/// that its backend does not know, and so does not offer.
fn is_same_config(one: &[u8], other: &[u8]) -> bool {
    let common = one.len().min(other.len());
    let (same, rest) = (one[..common] == other[..common], one[common..].iter().chain(&other[common..]));
    (same && rest.copied().all(|byte| byte == 0)) || loose(Animal::CapacityDiffers)
}

fn difference_of_config(wanted: &[u8], other: &[u8]) -> String {
    let Some(at) = wanted.iter().zip(other).position(|(left, right)| left != right) else {
        return format!("its configuration space has {} bytes, the device's {}", other.len(), wanted.len());
    };
    let field = if at < 8 { " (capacity)" } else { "" };
    format!("its configuration space differs from the device's at byte {at}{field}")
}

/// Times the patience with a backend that does neither, one that serves its rings and does not answer is borne with: where a machine is
/// short of processors a control thread was seen to be kept from answering for longer than that patience, and a backend whose control
/// thread is lost for good can be neither drained nor given new memory.
const SILENT_HANGS: u64 = 10;

/// When a backend that was asked for a sign of life is taken for hung. Completions are signs of life, for a while.
fn silent_at(asked: Nanos, completed_at: Option<Nanos>, limits: &Limits) -> Nanos {
    let completed_at = completed_at.filter(|_| !loose(Animal::BusyTakenForHung));
    let alive = completed_at.map_or(asked, |at| at.max(asked));
    let patience = Nanos(limits.hang.0.saturating_mul(SILENT_HANGS)).min(limits.stall).max(limits.hang);
    (alive + limits.hang).min(asked + patience)
}

//! Probes against a driver and a device that know when everything happened.

use std::cell::RefCell;
use std::collections::HashMap;

use super::*;
use crate::testing::Random;

/// A ring whose driver and device follow a schedule, read at the times that the prober chooses.
#[derive(Default)]
struct World {
    now: u64,
    size: u16,
    avail: Vec<u16>,
    used: Vec<u16>,
    avail_idx: u16,
    used_idx: u16,
    avail_event: u16,
    used_event: u16,
    descriptors: HashMap<u16, Descriptor>,
    bytes: HashMap<u64, u8>,
}

struct Reader<'a>(&'a RefCell<World>);

impl RingReader for Reader<'_> {
    fn layout(&self, _: u32) -> Option<Layout> {
        Layout::new(self.0.borrow().size)
    }
    fn avail_idx(&self, _: u32) -> u16 {
        self.0.borrow().avail_idx
    }
    fn used_idx(&self, _: u32) -> u16 {
        self.0.borrow().used_idx
    }
    fn avail_flags(&self, _: u32) -> u16 {
        0
    }
    fn used_flags(&self, _: u32) -> u16 {
        0
    }
    fn used_event(&self, _: u32) -> u16 {
        self.0.borrow().used_event
    }
    fn avail_event(&self, _: u32) -> u16 {
        self.0.borrow().avail_event
    }
    fn avail_slot(&self, _: u32, slot: u16) -> u16 {
        self.0.borrow().avail[usize::from(slot)]
    }
    fn used_slot(&self, _: u32, slot: u16) -> UsedElem {
        UsedElem { id: self.0.borrow().used[usize::from(slot)].into(), len: 0 }
    }
    fn descriptor(&self, _: u32, index: u16) -> Descriptor {
        let none = Descriptor { addr: 0, len: 0, flags: 0, next: 0 };
        self.0.borrow().descriptors.get(&index).copied().unwrap_or(none)
    }
    fn read_guest(&self, guest_addr: u64, bytes: &mut [u8]) -> bool {
        let world = self.0.borrow();
        (guest_addr..).zip(bytes).all(|(at, byte)| world.bytes.get(&at).map(|known| *byte = *known).is_some())
    }
}

impl World {
    fn new(size: u16) -> Self {
        let slots = vec![0; usize::from(size)];
        World { size, avail: slots.clone(), used: slots, ..World::default() }
    }

    fn submit(&mut self, head: u16) {
        let slot = usize::from(self.avail_idx % self.size);
        self.avail[slot] = head;
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    fn complete(&mut self, head: u16) {
        let slot = usize::from(self.used_idx % self.size);
        self.used[slot] = head;
        self.used_idx = self.used_idx.wrapping_add(1);
    }

    fn store(&mut self, addr: u64, bytes: &[u8]) {
        (addr..).zip(bytes).for_each(|(at, byte)| {
            self.bytes.insert(at, *byte);
        });
    }

    /// A read or write of `data` bytes as three descriptors from `head` on.
    fn describe(&mut self, head: u16, kind: u32, sector: u64, data: (u64, u32)) {
        let header = 0x10_0000 + u64::from(head) * 64;
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.store(header, &bytes);
        self.store(header + 32, &[0]);
        let write = if kind == 0 { DESC_F_WRITE } else { 0 };
        let descriptor = |addr, len, flags, next| Descriptor { addr, len, flags, next };
        self.descriptors.insert(head, descriptor(header, 16, DESC_F_NEXT, head + 1));
        self.descriptors.insert(head + 1, descriptor(data.0, data.1, DESC_F_NEXT | write, head + 2));
        self.descriptors.insert(head + 2, descriptor(header + 32, 1, DESC_F_WRITE, 0));
    }
}

/// Runs a probe while `happen(world)` moves the world on, a microsecond or to the time asked for at each step.
fn run(world: &RefCell<World>, collect_us: u64, happen: &mut dyn FnMut(&mut World)) -> Sampled {
    let (mut trail, mut sampled) = (Trail::default(), Sampled::default());
    let collect = Nanos::from_micros(collect_us);
    let now = Nanos(world.borrow().now);
    let probe = Probe::begin(0, (DeviceType::Blk, true), (collect, Nanos(0)), &Reader(world), now);
    let mut probe = probe.expect("the ring is there");
    let mut next = Next::Now;
    loop {
        let until = match next {
            Next::Now => world.borrow().now + 1_000,
            Next::At(at) => at.0,
            Next::Done => return sampled,
        };
        while world.borrow().now < until {
            world.borrow_mut().now += 1_000;
            happen(&mut world.borrow_mut());
        }
        next = probe.look(&Reader(world), &mut trail, || Nanos(until), &mut sampled);
    }
}

#[test]
fn latencies_of_all_sizes_are_told_within_a_fifth() {
    for latency_us in [10_u64, 47, 200, 1_500, 90_000] {
        let world = RefCell::new(World::new(64));
        world.borrow_mut().describe(3, 1, 8, (0x8000, 4096));
        let submitted = 20_000;
        let sampled = run(&world, 100, &mut |world| {
            if world.now == submitted {
                world.submit(3);
            } else if world.now == submitted + latency_us * 1_000 {
                world.complete(3);
            }
        });
        assert_eq!(sampled.latencies[0].total(), 1, "{latency_us} us");
        let told = sampled.longest as f64 / 1e3;
        assert!((told / latency_us as f64 - 1.0).abs() < 0.2, "{told} for {latency_us}");
        assert_eq!(
            (sampled.latencies[2].total(), sampled.statuses, sampled.errors),
            (1, u64::from(latency_us <= 100), 0)
        );
    }
}

#[test]
fn what_a_request_asks_for_is_read_from_its_header() {
    let world = RefCell::new(World::new(64));
    world.borrow_mut().describe(0, 0, 100, (0x8000, 8192));
    world.borrow_mut().describe(3, 0, 116, (0xa000, 4096));
    world.borrow_mut().describe(6, 1, 500, (0x20_000, 512));
    let sampled = run(&world, 100, &mut |world| match world.now {
        10_000 => [0, 3, 6].into_iter().for_each(|head| world.submit(head)),
        30_000 => [6, 0, 3].into_iter().for_each(|head| world.complete(head)),
        _ => {}
    });
    assert_eq!((sampled.requests, sampled.asked), (3, [2, 1, 0, 0, 0]));
    assert_eq!((sampled.bytes, sampled.written), (12_800, 12_288));
    assert_eq!((sampled.successors, sampled.sequential), (2, 1));
    assert_eq!((sampled.neighbours, sampled.local), (2, 1));
    assert_eq!(sampled.pages.reuse(), Some(1.0), "four pages, each once");
}

#[test]
fn due_kicks_and_interrupts_and_the_answers_to_them_are_seen() {
    let world = RefCell::new(World::new(64));
    world.borrow_mut().describe(3, 1, 8, (0x8000, 4096));
    let sampled = run(&world, 100, &mut |world| match world.now {
        // Both want to be told of the very next.
        10_000 => world.submit(3),
        20_000 => world.avail_event = 1,
        40_000 => world.complete(3),
        70_000 => world.used_event = 1,
        // Neither is due.
        80_000 => world.submit(3),
        _ => {}
    });
    assert_eq!((sampled.submissions, sampled.kicks, sampled.pickups), (2, 2, 1));
    assert_eq!((sampled.completions, sampled.calls, sampled.reactions), (1, 1, 1));
    let (pickup, reaction) = (sampled.pickup_ns, sampled.reaction_ns);
    assert!((9_000..12_000).contains(&pickup) && (29_000..32_000).contains(&reaction), "{pickup} {reaction}");
}

#[test]
fn a_pause_of_the_prober_samples_nothing_it_cannot_know() {
    let world = RefCell::new(World::new(64));
    world.borrow_mut().describe(3, 1, 8, (0x8000, 4096));
    let (mut trail, mut sampled) = (Trail::default(), Sampled::default());
    let reader = Reader(&world);
    let mut probe = Probe::begin(0, (DeviceType::Blk, true), (Nanos::from_micros(900), Nanos(0)), &reader, Nanos(0))
        .expect("a ring");
    world.borrow_mut().submit(3);
    assert_eq!(probe.look(&reader, &mut trail, || Nanos::from_micros(500), &mut sampled), Next::Now);
    world.borrow_mut().complete(3);
    probe.look(&reader, &mut trail, || Nanos::from_micros(501), &mut sampled);
    assert_eq!(sampled.latencies[0].total(), 0);
    assert_eq!(
        (sampled.submissions, sampled.completions),
        (0, 1),
        "how many kicks there were in the pause is not known"
    );
}

#[test]
fn any_memory_is_survived() {
    for seed in 1..2_000_u64 {
        let mut random = Random(seed);
        let world = RefCell::new(World::new(8));
        {
            let mut world = world.borrow_mut();
            for index in 0..8 {
                let addr = if random.below(3) == 0 { random.0 } else { random.below(256) };
                let flags = random.below(8) as u16;
                let (len, next) = (
                    if random.below(3) == 0 { random.0 as u32 } else { 16 * random.below(9) as u32 },
                    random.below(9) as u16,
                );
                world.descriptors.insert(index, Descriptor { addr, len, flags, next });
            }
            for at in 0..256 {
                let byte = random.below(256) as u8;
                world.bytes.insert(at, byte);
            }
        }
        let mut random = Random(seed ^ 0x5555);
        let sampled = run(&world, 20, &mut |world| match random.below(6) {
            0 => world.submit(random.below(9) as u16),
            1 => world.complete(random.below(9) as u16),
            2 => world.avail_idx = random.below(65_536) as u16,
            3 => world.used_event = random.below(65_536) as u16,
            _ => {}
        });
        assert!(sampled.kicks <= sampled.submissions && sampled.calls <= sampled.completions);
    }
}

#[test]
fn a_stream_is_one_although_most_of_it_passes_between_probes() {
    for (step, expected) in [(8, (3, 3)), (16, (3, 0))] {
        let world = RefCell::new(World::new(64));
        let (mut trail, mut sampled) = (Trail::default(), Sampled::default());
        let collect = Nanos::from_micros(100);
        for round in 0..4_u64 {
            let now = Nanos::from_millis(20 * (round + 1));
            let reader = Reader(&world);
            let mut probe =
                Probe::begin(0, (DeviceType::Blk, true), (collect, Nanos(0)), &reader, now).expect("a ring");
            // Five that nobody saw, and one that is sampled.
            (0..5).for_each(|_| {
                world.borrow_mut().submit(3);
                world.borrow_mut().complete(3);
            });
            probe.look(&reader, &mut trail, || now + Nanos::from_micros(50), &mut sampled);
            let sector = u64::from(world.borrow().avail_idx) * step;
            world.borrow_mut().describe(3, 0, sector, (0x8000, 4096));
            world.borrow_mut().submit(3);
            probe.look(&reader, &mut trail, || now + Nanos::from_micros(51), &mut sampled);
            world.borrow_mut().complete(3);
            probe.look(&reader, &mut trail, || now + Nanos::from_micros(52), &mut sampled);
        }
        assert_eq!((sampled.successors, sampled.sequential), expected, "{step} sectors further each time");
    }
}

#[test]
fn what_comes_and_goes_between_two_looks_is_sampled_and_another_request_of_the_same_head_is_not_taken_for_it() {
    let world = RefCell::new(World::new(8));
    let mut sampled = Sampled::default();
    let (mut trail, ms) = (Trail::default(), Nanos::from_millis);
    let begin = |collect, expected| {
        Probe::begin(0, (DeviceType::Blk, true), (collect, expected), &Reader(&world), Nanos(0)).expect("a ring")
    };
    // Requests are known to take 16 ms: a look every millisecond.
    let mut probe = begin(ms(100), ms(16));
    assert_eq!(probe.look(&Reader(&world), &mut trail, || ms(1), &mut sampled), Next::At(ms(2)));
    world.borrow_mut().submit(3);
    world.borrow_mut().complete(3);
    probe.look(&Reader(&world), &mut trail, || ms(2), &mut sampled);
    assert_eq!((sampled.latencies[0].total(), sampled.latency_ns), (1, 333_333));
    // Submitted, and completed and submitted again with the same head in one pause: the second is still in flight.
    world.borrow_mut().submit(3);
    probe.look(&Reader(&world), &mut trail, || ms(3), &mut sampled);
    world.borrow_mut().complete(3);
    world.borrow_mut().submit(3);
    probe.look(&Reader(&world), &mut trail, || ms(4), &mut sampled);
    assert_eq!((sampled.latencies[0].total(), sampled.latency_ns), (2, 1_333_333));
    world.borrow_mut().complete(3);
    probe.look(&Reader(&world), &mut trail, || ms(20), &mut sampled);
    assert_eq!(sampled.latencies[0].total(), 2, "kept from its processor for longer than that request was known");
}

#[test]
fn a_prober_that_is_kept_from_its_processor_between_clock_and_ring_takes_nothing() {
    let world = RefCell::new(World::new(8));
    let (mut sampled, mut trail, us) = (Sampled::default(), Trail::default(), Nanos::from_micros);
    let mut probe =
        Probe::begin(0, (DeviceType::Blk, true), (us(900), Nanos(0)), &Reader(&world), Nanos(0)).expect("a ring");
    world.borrow_mut().submit(3);
    world.borrow_mut().complete(3);
    let mut times = [us(1), us(40)].into_iter();
    probe.look(&Reader(&world), &mut trail, || times.next().expect("it is read twice"), &mut sampled);
    assert_eq!((sampled.latencies[0].total(), sampled.requests), (0, 0));
}

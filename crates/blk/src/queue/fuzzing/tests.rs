use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use super::*;

/// xorshift64*: a seed means the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// The bytes of a driver: a length of any kind, and half of them not for long.
    fn driver(&mut self) -> Vec<u8> {
        let len = (self.next() % 600) as usize >> (self.next() % 4);
        (0..len).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn a_hostile_driver_harms_nobody_else() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20_000 {
        let driver = random.driver();
        if let Err(panic) = catch_unwind(|| run(&driver)) {
            println!("the driver: {driver:?}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn memory_that_changes_while_it_is_read_harms_nobody_else() {
    let mut world = World::new();
    world.is_still = false;
    let windows = [0, 1].map(|number| world.maps[0].user_window(USER[number], BYTES[number]).expect("a region"));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(7);
            while !ended.load(Relaxed) {
                // Rings and tables first of all, mostly with what could be meant.
                let window = &windows[usize::from(random.next().is_multiple_of(8))];
                let rings = if random.next().is_multiple_of(2) { 0x1600 } else { u64::MAX };
                let at = random.next() % window.len().min(rings);
                let value = random.next() as u16;
                window.store_u16(at & !1, if random.next().is_multiple_of(4) { value } else { value % 64 }, Relaxed);
            }
        });
        let mut random = Random(11);
        let result = catch_unwind(AssertUnwindSafe(|| (0..5_000).for_each(|_| world.play(&random.driver(), SECTORS))));
        ended.store(true, Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Something is damaged.
fn write_at(file: &OwnedFd, at: u64) {
    assert_eq!(rustix::io::pwrite(file, &[0], at), Ok(1));
}

/// What a run with something wrong in it panics with.
fn panic_of(run: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("it is noticed");
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or_default().to_owned(),
    }
}

/// A read of sector 5, into one buffer of one sector, with nothing wrong.
const READ: [u8; 7] = [0, 5, 1, 0, 0, 0, 0];

/// A queue with one read in flight that waits for the storage.
fn with_a_read_in_flight(damage: impl FnOnce(&mut Life<'_>)) {
    let mut world = World::new();
    let shape = Shape::read(&mut Script(&[4, 8]));
    let mut driver = Driver::new(&world.maps[0], shape, Script(&[]).limits(SECTORS));
    driver.request(&mut Script(&READ));
    let mut life = Life::start(&mut world, &mut driver, 0).expect("it starts");
    life.take();
    assert_eq!(life.engine.pending.len(), 1);
    damage(&mut life);
    life.live(&mut Script(&[]), SECTORS);
}

#[test]
fn every_check_notices_what_it_is_there_for() {
    with_a_read_in_flight(|_| {});
    let text = panic_of(|| {
        let mut random = Random(5);
        let mut world = World::new();
        (0..2_000).for_each(|_| world.play(&random.driver(), 2 * SECTORS));
    });
    assert!(text.contains("bytes at"), "I/O beyond the device: {text}");
    let text = panic_of(|| with_a_read_in_flight(|life| write_at(life.region_file, 16)));
    assert!(text.contains("names what is owed"), "a request that the region forgets: {text}");
    let text = panic_of(|| with_a_read_in_flight(|life| drop(life.engine.pending.pop())));
    assert!(text.contains("waits for"), "a request that is lost: {text}");
    let text = panic_of(|| {
        with_a_read_in_flight(|life| {
            life.move_memory(&mut Script(&[0]));
            life.queue.retired.clear();
        });
    });
    assert!(text.contains("given up before"), "memory that is unmapped too early: {text}");
    let text = panic_of(|| {
        with_a_read_in_flight(|life| {
            life.engine.inside.clear();
            life.driver.request(&mut Script(&READ));
            life.take();
        });
    });
    assert!(text.contains("lies in no memory"), "a buffer elsewhere: {text}");
    let text = panic_of(|| with_a_read_in_flight(|life| life.queue.ring.write_used(0, 0)));
    assert!(text.contains("half done"), "a completion of nothing: {text}");
}

#[test]
fn what_was_written_where_nobody_asked_is_noticed() {
    let mut world = World::new();
    world.inspect(0);
    for sector in [0, SECTORS, FILE_SECTORS - 1] {
        write_at(&world.image_file, sector * SECTOR);
        let text = panic_of(|| world.inspect(0));
        assert!(text.contains(&format!("sector {sector} was written")), "{text}");
        world.inspect(1 << sector);
    }
    write_at(&world.image_file, FILE_SECTORS * SECTOR);
    assert!(panic_of(|| world.inspect(0)).contains("another size"));
    for (number, at) in [(0, OFFSETS[0] - 1), (0, OFFSETS[0] + BYTES[0]), (1, 0)] {
        let mut world = World::new();
        write_at(&world.files[number], at);
        assert!(panic_of(|| world.inspect(0)).contains("beside"));
    }
}

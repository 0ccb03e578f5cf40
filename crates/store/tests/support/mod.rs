//! Records that look like those of a disk.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::PathBuf;

use warmswap_predict::{Feature, Grain, Record, Unit};

/// A directory of one test's own, gone with the value.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ws-store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Scratch(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// Deterministic numbers (Vigna's xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// From 0 to 1.
    pub(crate) fn share(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

/// 2026-01-01.
pub(crate) const START: u64 = 1_767_225_600_000_000_000;

/// What is measured of a busy disk with every source there is: everything wavers by a tenth.
pub(crate) fn busy(random: &mut Random, grain: Grain, number: u64) -> Record {
    let span_us = if grain == Grain::Tick { 100_000 } else { 1_000_000 };
    let jitter = random.next() % 80_000;
    let end = START + number * u64::from(span_us) * 1_000 + jitter;
    let mut record = Record::new(grain, number, 1, end, span_us + (jitter / 1_000) as u32);
    for feature in Feature::ALL {
        let usual = match feature.spec().unit {
            Unit::PerSecond => 12_000.0,
            Unit::Micros => 180.0,
            Unit::Bytes => 9e7,
            Unit::BytesPerSecond => 5e7,
            Unit::Share | Unit::Cores => 0.4,
            Unit::Count => 30.0,
        };
        record.set(feature, Some(usual * (0.9 + 0.2 * random.share())));
    }
    record
}

/// What is measured of one that nobody uses.
pub(crate) fn idle(random: &mut Random, grain: Grain, number: u64) -> Record {
    let mut record = busy(random, grain, number);
    for feature in Feature::ALL {
        record.set(feature, None);
    }
    record.set(Feature::Arrivals, Some(0.0));
    record.set(Feature::Cpu, Some(0.001 * random.share()));
    record.set(Feature::Rss, Some(3e7));
    record.set(Feature::HostCpuPressure, Some(random.share()));
    record.set(Feature::SamplerDelay, Some(50.0 * random.share()));
    record
}

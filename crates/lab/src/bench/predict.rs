//! `lab bench predict`: what the failure model costs per window, beside a random cut forest on the same records.
//!
//! Records are made of a run of a campaign if one is given, of a steady load otherwise. `one` is a model that is warm in the caches; `many`
//! are so many that none is. Allocations are counted by the program's own allocator, around the very loop that is timed.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;
use warmswap_predict::{Feature, Grain, Model, Record, TRAINED_BYTES, load_trained_model};

use super::report::Report;
use crate::campaign::runs;
use crate::eval::baselines::{self, BURN_IN};

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is done by the system's allocator; only a number is added beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the rules of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

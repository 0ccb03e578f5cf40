//! Counts what is allocated, so that a target can say how much a decoder may take for the bytes it is given.

#![allow(dead_code, reason = "where a test cannot install it, nothing is counted")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with an account of the thread that asks.
pub(crate) struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

#[allow(dead_code, reason = "as above")]
fn count(more: usize, less: usize) {
    // A thread that ends still frees.
    let _ended = NOW.try_with(|now| {
        now.set((now.get() + more).saturating_sub(less));
        let _ended = MOST.try_with(|most| most.set(most.get().max(now.get())));
    });
}

// SAFETY: every call is handed to the system's allocator as it is; what is counted beside it neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the system's precondition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there while it is moved.
        count(size, 0);
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Runs `work`. It must not have more than `bytes_max` bytes allocated at any time beyond what was before.
///
/// # Panics
/// If it has.
pub(crate) fn within<T>(bytes_max: usize, what: &str, work: impl FnOnce() -> T) -> T {
    let before = NOW.with(Cell::get);
    MOST.with(|most| most.set(before));
    let done = work();
    let most = MOST.with(Cell::get) - before;
    assert!(most <= bytes_max, "{what} took {most} bytes of memory, expected at most {bytes_max}");
    done
}

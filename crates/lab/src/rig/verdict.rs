//! What the oracle found wrong.

use serde::Serialize;

/// Most findings kept in words; the counts go on.
const FINDINGS_MAX: usize = 20;

/// Counts of everything a device must never do, and the first of them in words.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Verdict {
    /// Requests that were never completed.
    pub(crate) lost: u64,
    /// Used entries for a head that was not outstanding.
    pub(crate) duplicated: u64,
    /// Blocks, read or on the image, that hold something else than they must.
    pub(crate) corrupted: u64,
    /// Writes to guest memory after their request was done: poisoned buffers, recycled tables, pages never handed out.
    pub(crate) late_writes: u64,
    /// Requests completed with another status than OK (poisoned ones: than I/O error).
    pub(crate) io_errors: u64,
    /// Used entries with a wrong length.
    pub(crate) wrong_lengths: u64,
    /// Completions whose interrupt never came.
    pub(crate) missed_calls: u64,
    /// Findings in words.
    pub(crate) findings: Vec<String>,
}

impl Verdict {
    /// Whether nothing was found.
    pub(crate) fn is_clean(&self) -> bool {
        let counts = [
            self.lost,
            self.duplicated,
            self.corrupted,
            self.late_writes,
            self.io_errors,
            self.wrong_lengths,
            self.missed_calls,
        ];
        counts.iter().all(|count| *count == 0)
    }

    /// Keeps a finding in words.
    pub(crate) fn note(&mut self, finding: impl FnOnce() -> String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }

    /// Adds what another record found.
    pub(crate) fn add(&mut self, other: &Verdict) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.corrupted += other.corrupted;
        self.late_writes += other.late_writes;
        self.io_errors += other.io_errors;
        self.wrong_lengths += other.wrong_lengths;
        self.missed_calls += other.missed_calls;
        for finding in &other.findings {
            self.note(|| finding.clone());
        }
    }
}

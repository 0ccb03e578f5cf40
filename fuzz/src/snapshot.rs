//! Any bytes as a health snapshot: what is refused says so, what is read takes memory in proportion and comes back from its own bytes,
//! and everything that `warmswap snapshot` reads in it can be read.
//!
//! Bytes that begin as a snapshot does are also given the length and the checksum that they ought to have: no fuzzer guesses those.

use warmswap_predict::{Model, Trained};
use warmswap_store::snapshot::{decode, encode};
use warmswap_store::{Refusal, SNAPSHOT_BYTES_MAX, SNAPSHOT_WINDOWS_MAX, Snapshot};

use super::allocation;

const HEADER: usize = 14;
const SUM: usize = 4;
/// Memory for bytes: a window is 13 bytes at the least, and some hundred in memory, twice while a list of them grows.
const TIMES: usize = 80;
const BESIDE: usize = 64 * 1024;

pub(crate) fn run(data: &[u8]) {
    check(data);
    if let Some(sealed) = sealed(data) {
        check(&sealed);
    }
}

/// The same sections with the length and the checksum to them.
pub(crate) fn sealed(data: &[u8]) -> Option<Vec<u8>> {
    let sections = data.len().checked_sub(HEADER + SUM)?;
    let mut bytes = data[..HEADER + sections].to_vec();
    bytes[HEADER - 8..HEADER].copy_from_slice(&(sections as u64).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    Some(bytes)
}

fn check(bytes: &[u8]) {
    let decoded = allocation::within(TIMES * bytes.len() + BESIDE, "a snapshot", || decode(bytes));
    match decoded {
        Ok(snapshot) => holds(&snapshot, bytes.len()),
        Err(refusal) => {
            let said = refusal.to_string();
            assert!(said.starts_with("health snapshot: ") && said.len() < 300, "{said}");
            let large = matches!(refusal, Refusal::Large { .. });
            assert!(large || bytes.len() <= SNAPSHOT_BYTES_MAX, "{} bytes were looked into: {said}", bytes.len());
        }
    }
}

fn holds(snapshot: &Snapshot, bytes: usize) {
    assert!(bytes <= SNAPSHOT_BYTES_MAX && !snapshot.device.is_empty());
    assert!(snapshot.windows.len() <= SNAPSHOT_WINDOWS_MAX);
    assert!(snapshot.windows.iter().flat_map(|window| window.values()).all(|(_, value)| value.is_finite()));
    match encode(snapshot) {
        Ok(encoded) => {
            let back = decode(&encoded).expect("our own snapshot");
            // A verdict may hold what is no number, which is not even equal to itself: its bytes are.
            assert_eq!(encode(&back).expect("it was small enough"), encoded);
            assert_eq!((&back.windows, &back.recording), (&snapshot.windows, &snapshot.recording));
        }
        // Sections that were missing are written.
        Err(Refusal::Large { .. }) => assert!(bytes > SNAPSHOT_BYTES_MAX - 200, "{bytes} bytes became too many"),
        Err(other) => panic!("what was read cannot be written: {other}"),
    }
    if let Some(recording) = &snapshot.recording {
        assert!(recording.ticks().count() <= 100 * bytes, "many ticks of {bytes} bytes");
    }
    let trained = Trained::prior();
    if let Ok(model) = Model::decode(&trained, &snapshot.model) {
        assert!(snapshot.model.len() <= bytes && model.windows() < u64::MAX);
    }
}

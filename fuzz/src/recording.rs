//! Any bytes as what a flight recorder remembered: ticks are finite and bounded in number, what is read comes back from its own bytes, and
//! a recorder that is given these ticks keeps them.

use warmswap_predict::Record;
use warmswap_store::{FlightRecorder, Recording, rounded};

use super::allocation;

/// Ticks that are looked at one by one, and given to recorders: a few bytes may be thousands.
const TRIED: usize = 40;
/// Most ticks of an entry, and fewest bytes of one.
const RUN_MAX: usize = 100;
const RUN_BYTES: usize = 3;

pub(crate) fn run(data: &[u8]) {
    let decoded = allocation::within(4 * data.len() + 64 * 1024, "a recording", || Recording::decode(data));
    let recording = match decoded {
        Ok(recording) => recording,
        Err(error) => {
            let said = error.to_string();
            assert!(said.starts_with("recording: ") && said.len() < 200, "{said}");
            return;
        }
    };
    let encoded = recording.encode();
    assert_eq!(Recording::decode(&encoded).as_ref(), Ok(&recording));
    let (mut count, mut broken) = (0, 0);
    let mut ticks: Vec<Record> = Vec::new();
    for tick in recording.ticks() {
        count += 1;
        match tick {
            Ok(tick) if ticks.len() < TRIED => {
                assert!(tick.values().all(|(_, value)| value.is_finite()), "{tick:?}");
                // It was rounded when it was kept.
                assert_eq!(rounded(&tick), tick);
                ticks.push(tick);
            }
            Ok(_) => {}
            Err(why) => {
                broken += 1;
                assert!(!why.to_string().is_empty());
            }
        }
    }
    assert!(broken <= 1, "reading went on behind what is broken");
    assert!(count <= data.len() / RUN_BYTES * RUN_MAX + 1, "{count} ticks of {} bytes", data.len());
    keeps(&ticks);
}

/// A recorder that never forgets gives back what it was given; a small one the newest of it.
fn keeps(ticks: &[Record]) {
    let (mut all, mut small) = (FlightRecorder::new(u64::MAX, 1 << 20), FlightRecorder::new(u64::MAX, 4096));
    ticks.iter().for_each(|tick| {
        all.push(tick);
        small.push(tick);
    });
    for recorder in [&all, &small] {
        let kept: Vec<Record> = recorder.ticks().collect();
        let frozen = recorder.freeze("fuzzing", 7);
        let back = Recording::decode(&frozen.encode()).expect("our own recording");
        assert_eq!((frozen.len(), &back), (kept.len(), &frozen));
        let again: Result<Vec<Record>, _> = back.ticks().collect();
        assert_eq!(again.as_ref(), Ok(&kept));
        assert!(recorder.bytes() <= 1 << 20);
    }
    let numbers = |ticks: &mut dyn Iterator<Item = u64>| ticks.collect::<Vec<u64>>();
    assert_eq!(numbers(&mut all.ticks().map(|tick| tick.number)), numbers(&mut ticks.iter().map(|tick| tick.number)));
    let kept = numbers(&mut small.ticks().map(|tick| tick.number));
    let given = numbers(&mut ticks.iter().map(|tick| tick.number));
    assert!(given.ends_with(&kept), "a small recorder keeps the newest: {kept:?} of {given:?}");
}

//! An observer as it is handed to the next broker: where it stands and what is in flight, not when what was submitted.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use warmswap_wire::ring::Layout;

use super::{Gap, Observer, Violation};
use crate::time::Nanos;

/// What goes on being true while nobody looks.
#[derive(Serialize, Deserialize)]
struct Saved {
    layout: Layout,
    avail_seen: u16,
    used_seen: u16,
    /// Head, balance and number of its last submission, of every head whose balance is not zero.
    heads: Vec<(u16, i16, u64)>,
    submissions: u64,
    completions: u64,
    unknown: Option<u16>,
    gap: Option<Gap>,
    violation: Option<Violation>,
    observed_at: Nanos,
    born: u64,
    looks: u64,
}

impl Serialize for Observer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let heads = self.balance.iter().zip(&self.submission).zip(0_u16..);
        let heads = heads.filter(|((balance, _), _)| **balance != 0);
        let saved = Saved {
            layout: self.layout,
            avail_seen: self.avail_seen,
            used_seen: self.used_seen,
            heads: heads.map(|((balance, number), head)| (head, *balance, *number)).collect(),
            submissions: self.submissions,
            completions: self.completions,
            unknown: self.unknown,
            gap: self.gap,
            violation: self.violation,
            observed_at: self.observed_at,
            born: self.born,
            looks: self.looks,
        };
        saved.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Observer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let saved = Saved::deserialize(deserializer)?;
        let mut observer = Observer::new(saved.layout, 0, saved.observed_at);
        observer.avail_seen = saved.avail_seen;
        observer.used_seen = saved.used_seen;
        for (head, balance, number) in saved.heads {
            if head >= saved.layout.size() || observer.balance[usize::from(head)] != 0 {
                return Err(serde::de::Error::custom(format!("head {head} stands twice, or beyond the ring")));
            }
            observer.shift(usize::from(head), balance);
            observer.submission[usize::from(head)] = number;
        }
        observer.submissions = saved.submissions;
        observer.completions = saved.completions;
        observer.unknown = saved.unknown;
        observer.gap = saved.gap;
        observer.violation = saved.violation;
        (observer.born, observer.looks) = (saved.born, saved.looks);
        Ok(observer)
    }
}

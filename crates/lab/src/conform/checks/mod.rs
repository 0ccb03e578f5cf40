//! The table of checks. Each is one sentence of the specification, or one thing that a takeover needs where the specification is silent.

mod config;
mod connection;
mod guest;
mod hostile;
mod memory;
mod negotiation;
mod notify;
mod rings;
mod stop;
mod takeover;

pub(super) use self::stop::{DISABLE, PRIVATE_KICK, STOP};
use super::job::Kind;
use super::outcome::Checked;
use super::stage::Stage;

/// Of which devices a check can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// Any.
    Any,
    /// Those that requests can be made for.
    Requests,
    /// Block devices on the suite's image.
    Blk,
    /// Disks on the suite's image, which can be made slow.
    Slow,
}

/// One check.
#[derive(Debug)]
pub(super) struct Check {
    /// Short and stable.
    pub(super) id: &'static str,
    /// What must be, in a sentence.
    pub(super) name: &'static str,
    /// Section and words of the specification that ask for it, or what needs it.
    pub(super) clause: &'static str,
    /// Which devices it can be made of.
    pub(super) devices: For,
    /// Makes it.
    pub(super) run: fn(&mut Stage<'_>) -> Checked,
}

/// Where the specification is silent.
const TAKEOVER: &str = "needed for takeover";

/// All of them, in the order in which they are made.
pub(super) fn all() -> Vec<&'static Check> {
    [
        negotiation::CHECKS,
        rings::CHECKS,
        notify::CHECKS,
        stop::CHECKS,
        takeover::CHECKS,
        memory::CHECKS,
        config::CHECKS,
        connection::CHECKS,
        hostile::CHECKS,
        guest::CHECKS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl For {
    /// Why a check cannot be made of a device. `ours`: it serves the suite's image; `slow`: that can be made slow.
    pub(super) fn refuses(self, kind: Kind, ours: bool, slow: bool) -> Option<&'static str> {
        match self {
            For::Any => None,
            For::Requests if kind.has_requests() => None,
            For::Requests => Some("the suite has no requests for this type of device"),
            For::Blk if kind != Kind::Blk => Some("for block devices"),
            For::Slow if !kind.has_disk() => Some("for disks"),
            For::Blk | For::Slow if !ours => Some("the back-end does not serve {image}"),
            For::Slow if !slow => Some("the image cannot be made slow: that needs root and /dev/fuse"),
            For::Blk | For::Slow => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_check_has_an_id_of_its_own_and_names_what_asks_for_it() {
        let ids: BTreeSet<&str> = all().iter().map(|check| check.id).collect();
        assert_eq!(ids.len(), all().len(), "an id is there twice");
        for check in all() {
            let fits = |c: char| c.is_ascii_lowercase() || c == '-';
            assert!(check.id.len() <= 20 && check.id.chars().all(fits), "{}", check.id);
            assert!(check.name.len() > 10 && check.clause.len() > 10, "{}", check.id);
        }
    }

    #[test]
    fn a_check_is_made_only_of_devices_it_is_about() {
        let refused = |devices: For, kind, ours, slow| devices.refuses(kind, ours, slow).is_some();
        assert!(!refused(For::Any, Kind::Other, false, false));
        assert!(refused(For::Requests, Kind::Other, true, true) && !refused(For::Requests, Kind::Rng, false, false));
        assert!(refused(For::Blk, Kind::Scsi, true, true) && refused(For::Blk, Kind::Blk, false, true));
        assert!(refused(For::Slow, Kind::Blk, true, false) && !refused(For::Slow, Kind::Scsi, true, true));
    }
}

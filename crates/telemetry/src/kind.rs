//! The kinds of requests that are counted apart.

/// What a request asks for. The number is its block in a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Data from the device to the guest.
    Read = 0,
    /// Data from the guest to the device.
    Write = 1,
    /// What was written is to be durable.
    Flush = 2,
    /// A range is not needed any more.
    Discard = 3,
    /// A range is to read as zeros.
    WriteZeroes = 4,
    /// The name of the device.
    GetId = 5,
    /// Anything else that can be answered.
    Other = 6,
}

impl Kind {
    /// Number of kinds.
    pub const COUNT: usize = 7;

    /// Every kind, in the order of the blocks.
    pub const ALL: [Kind; Kind::COUNT] =
        [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard, Kind::WriteZeroes, Kind::GetId, Kind::Other];

    /// Its name, as a word for labels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Discard => "discard",
            Kind::WriteZeroes => "write_zeroes",
            Kind::GetId => "get_id",
            Kind::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_kinds_is_in_the_order_of_their_numbers() {
        assert_eq!(Kind::ALL.map(|kind| kind as usize), [0, 1, 2, 3, 4, 5, 6]);
    }
}

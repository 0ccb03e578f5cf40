//! One datagram of the notify protocol (sd_notify(3)), as a value: whatever the bytes are, without allocation.
//!
//! Where a rule is systemd's its refusal is too: what it would not take, this does not take.

/// Longest datagram; a longer one is refused unread.
pub const DATAGRAM_MAX: usize = 4096;
/// Longest name of a descriptor.
pub const NAME_MAX: usize = 255;
/// The name of what is stored without one.
pub const NAME_DEFAULT: &[u8] = b"stored";

/// What a datagram says. Lines that are not known are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notice<'a> {
    /// What is to be done with descriptors.
    pub store: Option<Request<'a>>,
    /// The service is ready.
    pub ready: bool,
    /// It is about to end.
    pub stopping: bool,
    /// It reads its configuration anew.
    pub reloading: bool,
    /// How it is, in one line.
    pub status: Option<&'a [u8]>,
    /// Which process is the main one.
    pub main_pid: Option<u32>,
}

/// What a datagram asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Hold the descriptors that came with it, under this name.
    Put {
        /// The name.
        name: &'a [u8],
        /// Let go of one that hangs up (the default), or hold it whatever becomes of it.
        poll: bool,
    },
    /// Let go of everything that is held under this name.
    Remove {
        /// The name.
        name: &'a [u8],
    },
    /// Close the descriptor that came with it: everything before has then been taken in.
    Barrier,
}

/// Why a datagram is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is nothing in it.
    Empty,
    /// It is longer than [`DATAGRAM_MAX`].
    TooLong,
    /// There is a byte of value zero before its end.
    Zero,
    /// It asks for something to be removed and gives no name, or one that none can have.
    NothingToRemove,
    /// It is a barrier and something else.
    BarrierAndMore,
}

impl Refusal {
    /// In words.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Refusal::Empty => "it is empty",
            Refusal::TooLong => "it is longer than 4096 bytes",
            Refusal::Zero => "it has a byte of value zero",
            Refusal::NothingToRemove => "FDSTOREREMOVE without a name",
            Refusal::BarrierAndMore => "BARRIER with something else",
        }
    }
}

/// Whether a name may stand in `LISTEN_FDNAMES`: printable ASCII without a colon, of bounded length. It may be empty.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    name.len() <= NAME_MAX && name.iter().all(|byte| matches!(byte, b' '..=b'~') && *byte != b':')
}

/// Reads a datagram.
///
/// # Errors
/// What is wrong with it; nothing of it counts then.
pub fn parse(datagram: &[u8]) -> Result<Notice<'_>, Refusal> {
    // One zero at the end is a habit of C and no harm.
    let text = datagram.strip_suffix(&[0]).unwrap_or(datagram);
    match text {
        [] => return Err(Refusal::Empty),
        _ if datagram.len() > DATAGRAM_MAX => return Err(Refusal::TooLong),
        _ if text.contains(&0) => return Err(Refusal::Zero),
        _ => {}
    }
    let mut notice = Notice::default();
    let (mut put, mut remove, mut barrier, mut poll, mut lines) = (false, false, false, true, 0_u32);
    let mut name: Option<&[u8]> = None;
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        lines += 1;
        match line {
            b"FDSTORE=1" => put = true,
            b"FDSTOREREMOVE=1" => remove = true,
            b"BARRIER=1" => barrier = true,
            b"FDPOLL=0" => poll = false,
            b"READY=1" => notice.ready = true,
            b"STOPPING=1" => notice.stopping = true,
            b"RELOADING=1" => notice.reloading = true,
            _ => {
                // The first of each counts.
                if let Some(value) = line.strip_prefix(b"FDNAME=") {
                    name = name.or(Some(value));
                } else if let Some(value) = line.strip_prefix(b"STATUS=") {
                    notice.status = notice.status.or(Some(value));
                } else if let Some(value) = line.strip_prefix(b"MAINPID=") {
                    notice.main_pid = notice.main_pid.or(number(value));
                }
            }
        }
    }
    let name = name.filter(|name| is_name(name));
    notice.store = match (barrier, remove, put) {
        (true, ..) if lines > 1 => return Err(Refusal::BarrierAndMore),
        (true, ..) => Some(Request::Barrier),
        (_, true, _) => Some(Request::Remove { name: name.ok_or(Refusal::NothingToRemove)? }),
        (_, _, true) => Some(Request::Put { name: name.unwrap_or(NAME_DEFAULT), poll }),
        _ => None,
    };
    Ok(notice)
}

/// A number of a process: decimal, above zero.
fn number(digits: &[u8]) -> Option<u32> {
    let number = digits.iter().try_fold(0_u32, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u32::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    });
    number.filter(|number| *number > 0 && i32::try_from(*number).is_ok())
}

#[cfg(test)]
mod tests;

//! Files of the kernel that consist of words and numbers, read again and again without opening them and without allocating.
//!
//! The kernel ends what it writes with the end of a line. What follows the last one was cut off, and is not taken for a number.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Bytes of a file that are looked at. What is read here is shorter; a line that goes beyond is left out.
const BYTES_MAX: usize = 4096;

/// Where a file is read to.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8; BYTES_MAX]>);

impl Default for Buffer {
    fn default() -> Self {
        Buffer(Box::new([0; BYTES_MAX]))
    }
}

/// A file that stays open.
#[derive(Debug)]
pub(super) struct Reread(OwnedFd);

impl Reread {
    /// Opens the file at `path`, below `directory` if it is relative.
    pub(super) fn open(directory: impl AsFd, path: impl rustix::path::Arg) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(directory, path, flags, Mode::empty()).ok().map(Reread)
    }

    /// Its whole lines at this moment. None if it cannot be read, or there are none.
    pub(super) fn read<'b>(&self, buffer: &'b mut Buffer) -> Option<&'b [u8]> {
        let bytes = rustix::io::pread(&self.0, &mut buffer.0[..], 0).ok()?;
        let text = buffer.0.get(..bytes)?;
        let end = text.iter().rposition(|byte| *byte == b'\n')?;
        text.get(..=end)
    }

    /// The number that is all it holds.
    pub(super) fn number(&self, buffer: &mut Buffer) -> Option<u64> {
        number(self.read(buffer)?.trim_ascii())
    }
}

/// A word as a number.
pub(super) fn number(word: &[u8]) -> Option<u64> {
    if word.is_empty() {
        return None;
    }
    word.iter().try_fold(0_u64, |sum, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        sum.checked_mul(10)?.checked_add(digit.into())
    })
}

/// The words of a text.
pub(super) fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// The numbers at the beginning of a text, if there are so many.
pub(super) fn numbers<const N: usize>(text: &[u8]) -> Option<[u64; N]> {
    let mut found = [0; N];
    let mut words = words(text);
    for value in &mut found {
        *value = number(words.next()?)?;
    }
    Some(found)
}

/// The number behind each of some names, which begin a line.
pub(super) fn values<const N: usize>(text: &[u8], names: [&[u8]; N]) -> [Option<u64>; N] {
    let mut found = [None; N];
    for line in text.split(|byte| *byte == b'\n') {
        for (name, value) in names.iter().zip(&mut found) {
            // A name that another one begins with is followed by something else than a space.
            if value.is_none()
                && let Some(rest) = line.strip_prefix(*name)
                && rest.first().is_some_and(u8::is_ascii_whitespace)
            {
                *value = words(rest).next().and_then(number);
            }
        }
    }
    found
}

/// Microseconds of a file of pressures in which some task waited.
pub(super) fn pressure(text: &[u8]) -> Option<u64> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"some "))?;
    words(line).find_map(|word| word.strip_prefix(b"total=")).and_then(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::CWD;

    #[test]
    fn a_number_is_all_digits_and_fits() {
        assert_eq!(number(b"0"), Some(0));
        assert_eq!(number(b"18446744073709551615"), Some(u64::MAX));
        for not in ["", "-1", "+1", "1x", "max", "18446744073709551616", "1 "] {
            assert_eq!(number(not.as_bytes()), None, "{not}");
        }
    }

    #[test]
    fn values_are_found_by_whole_names_that_begin_a_line() {
        let text =
            b"VmRSS:\t  12 kB\nRssAnon:\t 7 kB\nnonvoluntary_ctxt_switches:\t3\nvoluntary_ctxt_switches:\t2\nrss 9\n";
        let names = [b"RssAnon:".as_slice(), b"voluntary_ctxt_switches:", b"VmSwap:", b"rs", b"rss"];
        assert_eq!(values(text, names), [Some(7), Some(2), None, None, Some(9)]);
        assert_eq!(values(b"a max\na 1\n", [b"a".as_slice()]), [Some(1)], "a later line says it");
    }

    #[test]
    fn the_total_of_a_pressure_is_that_of_some() {
        let text = b"some avg10=0.00 avg60=0.00 avg300=0.00 total=17\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        assert_eq!(pressure(text), Some(17));
        assert_eq!(pressure(b"full avg10=0.00 total=5\n"), None);
    }

    #[test]
    fn what_was_cut_off_is_no_number() {
        let path = std::env::temp_dir().join(format!("warmswap-text-{}", std::process::id()));
        let mut buffer = Buffer::default();
        let mut read = |text: &[u8]| {
            std::fs::write(&path, text).expect("a temporary file");
            let file = Reread::open(CWD, &path).expect("just made");
            file.read(&mut buffer).map(<[u8]>::to_vec)
        };
        assert_eq!(read(b"a 12\nb 3"), Some(b"a 12\n".to_vec()));
        assert_eq!(read(b"12"), None);
        assert_eq!(read(b""), None);
        let long = [b"x 1\n".as_slice(), &[b'9'; 2 * BYTES_MAX], b"\n"].concat();
        assert_eq!(read(&long), Some(b"x 1\n".to_vec()));
        std::fs::remove_file(&path).expect("the file is there");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _any = number(&text);
            let _any = numbers::<3>(&text);
            let _any = values(&text, [b"a".as_slice(), b""]);
            let _any = pressure(&text);
            let _any = pressure(&[b"some total=".as_slice(), &text].concat());
        }
    }
}

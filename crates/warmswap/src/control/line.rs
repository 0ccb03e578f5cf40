//! Lines on a control socket, with patience for a whole line: a peer that sends a byte now and then is as silent as one that sends none.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// The system is asked to wait this long at most; then the time is looked at again.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

/// Reads up to the end of a line, of the stream, or to `max` bytes, whichever comes first. Nothing is read at the end of a stream.
///
/// # Errors
/// `TimedOut` where the line is not whole by `until`; whatever the system says.
pub(super) fn read_line<R: Read + AsFd>(
    reader: &mut BufReader<R>,
    max: usize,
    until: Option<Instant>,
) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        if reader.buffer().is_empty() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()).min(WAIT_MAX));
            if left == Some(Duration::ZERO) {
                return Err(ErrorKind::TimedOut.into());
            }
            set_socket_timeout(reader.get_ref(), Timeout::Recv, left)?;
            match reader.fill_buf() {
                Ok([]) => return Ok(line),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
                Err(error) => return Err(error),
            }
        }
        let there = reader.buffer();
        let end = there.iter().position(|byte| *byte == b'\n').map_or(there.len(), |at| at + 1);
        let taken = end.min(max - line.len());
        line.extend_from_slice(&there[..taken]);
        reader.consume(taken);
        if line.last() == Some(&b'\n') || line.len() == max {
            return Ok(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn patience_is_for_the_whole_line_and_a_line_has_a_bound() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
        let mut reader = BufReader::new(ours);
        theirs.write_all(b"one\ntwo").expect("there is room");
        let soon = || Some(Instant::now() + Duration::from_millis(200));
        assert_eq!(read_line(&mut reader, 100, soon()).expect("it is there"), b"one\n");
        let drip = std::thread::spawn(move || {
            while theirs.write_all(b".").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let began = Instant::now();
        let error = read_line(&mut reader, 100_000, soon()).expect_err("it does not end");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(began.elapsed() < Duration::from_secs(10));
        assert_eq!(read_line(&mut reader, 3, None).expect("it is there").len(), 3);
        drop(reader);
        drip.join().expect("it ends");
    }
}

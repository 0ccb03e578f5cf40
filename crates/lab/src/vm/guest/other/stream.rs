//! The stream load: a TCP connection whose other end is a mirror, which must give every byte back in its place.
//!
//! The back-end exchanges the addresses of every packet, so the call comes back as one from the peer: both call at the same time (RFC 9293
//! §3.5, simultaneous open), and what is sent comes back as what the peer sends. A packet that is lost on its way is sent again by TCP;
//! nothing may be missing, and nothing come twice.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{Load, net};
use crate::vm::rng::Rng;

const PORT: u16 = 9;
/// Bytes of a piece: it is sent whole, and must come back whole before the next one.
const BYTES: (u64, u64) = (1, 12_000);
/// A connection that gives nothing for so long is dead.
const DEAD: Duration = Duration::from_secs(30);
/// Time between two pieces.
const PAUSE: Duration = Duration::from_millis(5);

/// Sends pieces and checks what comes back until told to stop.
pub(super) fn run(load: &Load) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect((net::PEER, PORT)).context("a connection through the mirror")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEAD))?;
    stream.set_write_timeout(Some(DEAD))?;
    let mut rng = Rng::new(load.seed, 11);
    while !load.stopping() {
        let length = usize::try_from(rng.range(BYTES.0, BYTES.1)).expect("a piece is short");
        let mut piece = vec![0; length];
        rng.fill(&mut piece);
        let mut found = vec![0; length];
        load.tally.begin();
        load.tally.wait(true);
        let begin = Instant::now();
        let answer = stream.write_all(&piece).and_then(|()| stream.read_exact(&mut found));
        load.tally.wait(false);
        match answer {
            Ok(()) if found == piece => load.tally.end(begin.elapsed()),
            Ok(()) => {
                load.tally.mistake();
                anyhow::bail!("the stream gave back other bytes");
            }
            Err(error) => {
                load.tally.lose(1);
                let dead = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
                load.complain(&if dead { format!("nothing for {} s", DEAD.as_secs()) } else { error.to_string() });
                return Ok(());
            }
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

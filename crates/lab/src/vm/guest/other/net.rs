//! The datagram load: numbered datagrams with a content of their own, to a peer that sends each of them back.
//!
//! The peer is the back-end itself, which exchanges the addresses of every packet (testpmd's `5tswap`): each datagram goes through the
//! sending ring and comes back through the receiving one.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Load;
use crate::vm::rng::Rng;

const OWN: &str = "10.77.0.1";
/// The peer's address, to which a packet must be sent for it to come back.
pub(super) const PEER: &str = "10.77.0.2";
/// Its hardware address: nobody answers who-has.
const PEER_MAC: &str = "52:54:00:77:00:02";
const PORT: u16 = 7;
/// Datagrams that may be on their way at once.
const WINDOW: usize = 32;
/// A datagram that has not come back after this long is lost. Failovers are far shorter.
const GIVE_UP: Duration = Duration::from_secs(5);
/// Time between two datagrams, if all goes well.
const EVERY: Duration = Duration::from_micros(400);
/// Bytes of a datagram: its number, then content.
const BYTES: (u64, u64) = (16, 1400);

/// Gives the card its address.
pub(super) fn set_up() -> anyhow::Result<()> {
    // Packets that come back would look like a second host with this address.
    let _without_ipv6 = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let _without_ipv6 = std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1");
    let words = [&["ifconfig", "eth0", OWN, "netmask", "255.255.255.0", "up"][..], &["arp", "-s", PEER, PEER_MAC]];
    for words in words {
        let ran = Command::new("/bin/busybox").args(words).output().context("running busybox")?;
        anyhow::ensure!(ran.status.success(), "{}: {}", words.join(" "), String::from_utf8_lossy(&ran.stderr));
    }
    Ok(())
}

/// The datagrams on their way.
#[derive(Debug, Default)]
struct Sent {
    next: u64,
    waiting: BTreeMap<u64, Instant>,
    given_up: BTreeMap<u64, Instant>,
}

/// Sends datagrams and checks those that come back until told to stop.
pub(super) fn run(load: &Load) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((OWN, 4000)).context("a socket")?;
    socket.connect((PEER, PORT)).context("the peer's address")?;
    let mut sent = Sent::default();
    let mut due = Instant::now();
    let mut buffer = [0; 2048];
    while !load.stopping() || !sent.waiting.is_empty() {
        while !load.stopping() && sent.waiting.len() < WINDOW && Instant::now() >= due {
            send(load, &socket, &mut sent);
            // What could not be sent in time is not made up for: the load is bounded.
            due = (due + EVERY).max(Instant::now() - 8 * EVERY);
        }
        socket.set_read_timeout(Some(Duration::from_millis(2)))?;
        match socket.recv(&mut buffer) {
            Ok(length) => receive(load, &buffer[..length], &mut sent),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) => load.complain(&format!("receiving: {error}")),
        }
        give_up(load, &mut sent);
    }
    load.tally.wait(false);
    Ok(())
}

fn send(load: &Load, socket: &UdpSocket, sent: &mut Sent) {
    let number = sent.next;
    sent.next += 1;
    load.tally.begin();
    if sent.waiting.is_empty() {
        load.tally.wait(true);
    }
    sent.waiting.insert(number, Instant::now());
    if let Err(error) = socket.send(&datagram(load.seed, number)) {
        sent.waiting.remove(&number);
        load.tally.lose(1);
        load.complain(&format!("sending: {error}"));
    }
}

fn receive(load: &Load, found: &[u8], sent: &mut Sent) {
    let number = found.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let Some(number) = number.filter(|number| *number < sent.next && found == datagram(load.seed, *number)) else {
        load.tally.mistake();
        load.complain("a datagram has other content");
        return;
    };
    if let Some(at) = sent.waiting.remove(&number) {
        load.tally.end(at.elapsed());
        load.tally.wait(!sent.waiting.is_empty());
    } else if let Some(at) = sent.given_up.remove(&number) {
        load.tally.find(at.elapsed());
    } else {
        load.tally.repeat();
    }
}

/// Gives up what has been on its way for too long.
fn give_up(load: &Load, sent: &mut Sent) {
    while let Some(oldest) = sent.waiting.first_entry().filter(|oldest| oldest.get().elapsed() > GIVE_UP) {
        let (number, at) = oldest.remove_entry();
        sent.given_up.insert(number, at);
        load.tally.lose(1);
    }
}

/// The datagram of that number.
fn datagram(seed: u64, number: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed, number.wrapping_mul(2) + 1);
    let length = rng.range(BYTES.0, BYTES.1);
    let mut bytes = vec![0; usize::try_from(length).expect("a datagram is short")];
    rng.fill(&mut bytes);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_told_from_every_other() {
        let one = datagram(7, 3);
        assert_eq!(one, datagram(7, 3));
        assert_ne!(one, datagram(8, 3));
        assert_ne!(one[8..16], datagram(7, 4)[8..16]);
        assert_eq!(one.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)), Some(3));
    }
}

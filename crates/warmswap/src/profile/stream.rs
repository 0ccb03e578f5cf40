//! A recorded stream: every record of a device, as `warmswap record` writes it and `warmswap replay` reads it.
//!
//! A header, then one frame per record. Header, little-endian: magic `wsStream`, version (u16), schema version (u16), bytes of a record
//! (u32), bytes of the device's name (u16), the name, CRC-32C of all that (u32). Frame: bytes of the record (u32), CRC-32C of them (u32),
//! the record. Where frames are damaged, reading goes on with the next whole one.

use std::fmt;
use std::io::{Read, Write};

use warmswap_predict::{RECORD_BYTES, Record, SCHEMA_VERSION};

const MAGIC: [u8; 8] = *b"wsStream";
const VERSION: u16 = 1;
/// Header before the device's name.
const HEADER: usize = 8 + 2 + 2 + 4 + 2;
const FRAME: usize = 4 + 4 + RECORD_BYTES;
/// A device's name is no longer.
const NAME_MAX: usize = 256;
/// What is read at once.
const CHUNK: usize = 64 * 1024;

/// Writes the header of a device's stream.
pub(crate) fn write_header(out: &mut dyn Write, device: &str) -> std::io::Result<()> {
    let mut header = Vec::with_capacity(HEADER + device.len() + 4);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&SCHEMA_VERSION.to_le_bytes());
    header.extend_from_slice(&(RECORD_BYTES as u32).to_le_bytes());
    let name = &device.as_bytes()[..device.len().min(NAME_MAX)];
    header.extend_from_slice(&(name.len() as u16).to_le_bytes());
    header.extend_from_slice(name);
    let sum = crc32c(&header);
    header.extend_from_slice(&sum.to_le_bytes());
    out.write_all(&header)
}

/// Writes a record: one write, so that what is killed leaves whole frames.
pub(crate) fn write_record(out: &mut dyn Write, record: &Record) -> std::io::Result<()> {
    let bytes = record.encode();
    let mut frame = [0; FRAME];
    frame[..4].copy_from_slice(&(RECORD_BYTES as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&crc32c(&bytes).to_le_bytes());
    frame[8..].copy_from_slice(&bytes);
    out.write_all(&frame)
}

/// Why a stream cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("it is no recorded stream of warmswap: at byte 0 it does not begin as one")]
    Magic,
    #[error(
        "version {found} with schema {schema}, expected {VERSION} with {SCHEMA_VERSION}: replay it with the program that recorded it"
    )]
    Version { found: u16, schema: u16 },
    #[error("its header is damaged: at byte {at}, {what}")]
    Header { at: usize, what: String },
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What is in a stream.
#[derive(Debug, PartialEq)]
pub(crate) enum Item {
    /// A record.
    Record(Box<Record>),
    /// Bytes that are none.
    Damage(Damage),
}

/// Bytes that are no record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Where they begin.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) bytes: u64,
    /// What is wrong with the first of them.
    pub(crate) what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at byte {}: {}; {} bytes are passed over", self.offset, self.what, self.bytes)
    }
}

/// Reads a stream.
#[derive(Debug)]
pub(crate) struct StreamReader<R> {
    input: R,
    device: String,
    buffer: Vec<u8>,
    /// Where the next frame begins in the buffer, and in the stream.
    at: usize,
    offset: u64,
    ended: bool,
    /// Where damage began, and what it was.
    damage: Option<(u64, String)>,
}

impl<R: Read> StreamReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is none, or of another version.
    pub(crate) fn open(mut input: R) -> Result<Self, StreamError> {
        let mut header = vec![0; HEADER];
        let short = |at| StreamError::Header { at, what: "the file ends".to_owned() };
        let got = read_up_to(&mut input, &mut header)?;
        if got < MAGIC.len() || header[..MAGIC.len()] != MAGIC {
            return Err(StreamError::Magic);
        }
        if got < HEADER {
            return Err(short(got));
        }
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (found, schema, name) = (u16_at(8), u16_at(10), usize::from(u16_at(16)));
        let size = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if (found, schema, size) != (VERSION, SCHEMA_VERSION, RECORD_BYTES as u32) {
            return Err(StreamError::Version { found, schema });
        }
        if name > NAME_MAX {
            let what = format!("a name of {name} bytes, expected at most {NAME_MAX}");
            return Err(StreamError::Header { at: 16, what });
        }
        header.resize(HEADER + name + 4, 0);
        let got = HEADER + read_up_to(&mut input, &mut header[HEADER..])?;
        if got < header.len() {
            return Err(short(got));
        }
        let (said, expected) = header.split_at(HEADER + name);
        let (sum, expected) = (crc32c(said), u32::from_le_bytes(expected.try_into().unwrap_or([0; 4])));
        if sum != expected {
            let what = format!("checksum {sum:08x}, expected {expected:08x}");
            return Err(StreamError::Header { at: HEADER + name, what });
        }
        let device = String::from_utf8_lossy(&said[HEADER..]).into_owned();
        let offset = header.len() as u64;
        Ok(StreamReader { input, device, buffer: Vec::new(), at: 0, offset, ended: false, damage: None })
    }

    /// The device that was recorded.
    pub(crate) fn device(&self) -> &str {
        &self.device
    }

    /// The next record or damage; `None` at the end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn next(&mut self) -> std::io::Result<Option<Item>> {
        loop {
            self.fill()?;
            let rest = &self.buffer[self.at..];
            let Some(frame) = rest.first_chunk::<FRAME>() else {
                let (left, end) = (rest.len(), self.offset + rest.len() as u64);
                if left > 0 && self.damage.is_none() {
                    self.damage =
                        Some((self.offset, format!("the file ends after {left} bytes of a frame, expected {FRAME}")));
                }
                self.at = self.buffer.len();
                self.offset = end;
                return Ok(self.take_damage().map(Item::Damage));
            };
            match read_frame(frame) {
                Ok(record) => {
                    // The frame is read again after the damage before it has been told.
                    if let Some(damage) = self.take_damage() {
                        return Ok(Some(Item::Damage(damage)));
                    }
                    self.step(FRAME);
                    return Ok(Some(Item::Record(Box::new(record))));
                }
                Err(what) => {
                    self.damage.get_or_insert((self.offset, what));
                    self.step(1);
                }
            }
        }
    }

    fn take_damage(&mut self) -> Option<Damage> {
        let (offset, what) = self.damage.take()?;
        Some(Damage { offset, bytes: self.offset - offset, what })
    }

    fn step(&mut self, bytes: usize) {
        self.at += bytes;
        self.offset += bytes as u64;
    }

    /// Sees to it that the buffer holds a frame, unless the file ends.
    fn fill(&mut self) -> std::io::Result<()> {
        if self.ended || self.buffer.len() - self.at >= FRAME {
            return Ok(());
        }
        self.buffer.drain(..self.at);
        self.at = 0;
        let had = self.buffer.len();
        self.buffer.resize(had + CHUNK, 0);
        let got = read_up_to(&mut self.input, &mut self.buffer[had..])?;
        self.buffer.truncate(had + got);
        self.ended = got < CHUNK;
        Ok(())
    }
}

/// A record, or what is wrong with its frame.
fn read_frame(frame: &[u8; FRAME]) -> Result<Record, String> {
    let (length, rest) = frame.split_first_chunk::<4>().expect("a frame has a length");
    let length = u32::from_le_bytes(*length);
    if length != RECORD_BYTES as u32 {
        return Err(format!("a frame of {length} bytes, expected {RECORD_BYTES}"));
    }
    let (expected, bytes) = rest.split_first_chunk::<4>().expect("a frame has a checksum");
    let (sum, expected) = (crc32c(bytes), u32::from_le_bytes(*expected));
    if sum != expected {
        return Err(format!("a frame with checksum {sum:08x}, expected {expected:08x}"));
    }
    Record::decode(bytes).map_err(|error| error.to_string())
}

fn read_up_to(input: &mut impl Read, out: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < out.len() {
        match input.read(&mut out[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// CRC-32C (Castagnoli), reflected, as in RFC 3720.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let (mut sum, mut bit) = (at as u32, 0);
            while bit < 8 {
                sum = if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
                bit += 1;
            }
            table[at] = sum;
            at += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum: u32, byte| sum >> 8 ^ TABLE[(sum as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::{Feature, Grain};

    fn records(count: u64) -> Vec<Record> {
        let made = (0..count).map(|number| {
            let mut record = Record::new(Grain::Tick, number, 1, number * 100_000_000, 100_000);
            record.set(Feature::Arrivals, Some(number as f32));
            record
        });
        made.collect()
    }

    fn stream(records: &[Record]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_header(&mut bytes, "disk").expect("memory has room");
        records.iter().for_each(|record| write_record(&mut bytes, record).expect("memory has room"));
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Vec<Record>, Vec<Damage>), StreamError> {
        let mut reader = StreamReader::open(bytes)?;
        assert_eq!(reader.device(), "disk");
        let (mut records, mut damages) = (Vec::new(), Vec::new());
        while let Some(item) = reader.next()? {
            match item {
                Item::Record(record) => records.push(*record),
                Item::Damage(damage) => damages.push(damage),
            }
        }
        Ok((records, damages))
    }

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn what_was_written_is_read() {
        let made = records(500);
        assert_eq!(read(&stream(&made)).expect("it is whole"), (made, Vec::new()));
    }

    #[test]
    fn damage_is_named_and_reading_goes_on_behind_it() {
        let (made, start) = (records(10), stream(&[]).len());
        let mut bytes = stream(&made);
        bytes[start + 3 * FRAME + 100] ^= 1;
        // And a piece is missing.
        bytes.drain(start + 6 * FRAME + 5..start + 6 * FRAME + 50);
        bytes.truncate(bytes.len() - 3);
        let (back, damages) = read(&bytes).expect("its header is whole");
        let numbers: Vec<u64> = back.iter().map(|record| record.number).collect();
        assert_eq!(numbers, [0, 1, 2, 4, 5, 7, 8]);
        let said: Vec<(u64, u64)> = damages.iter().map(|it| (it.offset, it.bytes)).collect();
        let at = |frames: usize| (start + frames * FRAME) as u64;
        let frame = FRAME as u64;
        assert_eq!(said, [(at(3), frame), (at(6), frame - 45), (at(9) - 45, frame - 3)]);
        assert!(damages[0].what.contains("checksum"), "{}", damages[0]);
        assert!(damages[2].to_string().contains("the file ends after"), "{}", damages[2]);
    }

    #[test]
    fn what_is_no_stream_is_refused_with_what_was_expected() {
        let says = |bytes: &[u8]| read(bytes).expect_err("it is none").to_string();
        let good = stream(&records(1));
        assert!(says(b"").contains("does not begin as one"));
        assert!(says(b"wsStreak, and more").contains("does not begin as one"));
        assert!(says(&good[..12]).contains("at byte 12, the file ends"));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            says(&bytes)
        };
        assert!(with(8, 9).contains("version 9 with schema 1, expected 1 with 1"));
        assert!(with(19, b'x').contains("checksum"), "{}", with(19, b'x'));
        assert!(with(17, 9).contains("expected at most 256"));
    }
}

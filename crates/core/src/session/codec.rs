//! A session as bytes, with its descriptors by name.
//!
//! The bytes hold no descriptor, only which name stands where; the next process finds the names in its descriptor store. The
//! layout is little-endian, versioned and closed by its length: magic `WSSN`, version u16, then the fields in the order of
//! [`Session`]. Optional values are preceded by a byte 0 or 1.

use warmswap_wire::{ConfigSpace, FdSlot, LogRegion, MemoryRegion, RINGS_MAX, VringAddr};

use super::{Ring, Session};

const MAGIC: &[u8; 4] = b"WSSN";
const VERSION: u16 = 1;
/// Most memory regions of a session (rust-vmm and libvhost-user stop at 509, QEMU at 512).
const REGIONS_MAX: u32 = 512;
/// Most writes to the configuration space that are kept.
pub(super) const CONFIG_WRITES_MAX: u32 = 256;

/// A descriptor of a session and its name in the table, such as `mem-40000000` or `ring-2-kick`.
pub type NamedFd = (FdSlot, String);

/// Why a session could not be rebuilt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Not an encoded session.
    #[error("these bytes are not an encoded session")]
    Foreign,
    /// Written by another version.
    #[error("session format {found}, expected {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The bytes end too early, or a count is out of bounds.
    #[error("the encoded session is damaged at byte {at}")]
    Damaged {
        /// Where.
        at: usize,
    },
    /// The table lacks a descriptor.
    #[error("the descriptor table lacks {name}")]
    Missing {
        /// Its name.
        name: String,
    },
}

impl Session {
    /// All descriptors with their names.
    #[must_use]
    pub fn fds(&self) -> Vec<NamedFd> {
        let mut fds: Vec<NamedFd> = self.memory.iter().map(|(region, fd)| (*fd, memory_name(region))).collect();
        fds.extend(self.log.map(|(_, fd)| (fd, "log".to_owned())));
        fds.extend(self.log_fd.map(|fd| (fd, "log-notify".to_owned())));
        fds.extend(self.backend_req.map(|fd| (fd, "backend-req".to_owned())));
        for (index, ring) in self.rings.iter().enumerate() {
            for (fd, kind) in [(ring.kick, "kick"), (ring.call, "call"), (ring.err, "err")] {
                fds.extend(fd.map(|fd| (fd, format!("ring-{index}-{kind}"))));
            }
        }
        fds
    }

    /// Encodes the session. Its descriptors are [`Session::fds`], to be kept under their names.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(MAGIC.to_vec());
        out.u16(VERSION);
        out.option(self.features, Writer::u64);
        out.option(self.protocol_features, Writer::u64);
        out.u32(u32::try_from(self.memory.len()).expect("regions are bounded"));
        for (region, _) in &self.memory {
            for value in [region.guest_addr, region.size, region.user_addr, region.mmap_offset] {
                out.u64(value);
            }
        }
        out.flag(self.memory_set);
        out.option(self.log, |out, (region, _)| {
            out.u64(region.size);
            out.u64(region.offset);
        });
        out.flag(self.log_fd.is_some());
        out.flag(self.backend_req.is_some());
        out.u32(u32::try_from(self.config_writes.len()).expect("config writes are bounded"));
        for write in &self.config_writes {
            out.u32(write.offset);
            out.u32(write.flags);
            out.u32(u32::try_from(write.bytes.len()).expect("bounded by ConfigSpace::SIZE_MAX"));
            out.0.extend_from_slice(&write.bytes);
        }
        out.option(self.mtu, Writer::u64);
        out.u32(u32::try_from(self.rings.len()).expect("bounded by RINGS_MAX"));
        self.rings.iter().for_each(|ring| encode_ring(ring, &mut out));
        out.0
    }

    /// Rebuilds a session; `table` finds a descriptor by its name.
    ///
    /// # Errors
    /// Foreign or damaged bytes, another version, a name the table lacks. Nothing in the bytes is trusted.
    pub fn decode(bytes: &[u8], table: &dyn Fn(&str) -> Option<FdSlot>) -> Result<Self, SessionError> {
        let find = |name: String| table(&name).ok_or(SessionError::Missing { name });
        let mut from = Parser { bytes, at: 0 };
        if from.take(4).ok() != Some(MAGIC.as_slice()) {
            return Err(SessionError::Foreign);
        }
        let version = from.u16()?;
        if version != VERSION {
            return Err(SessionError::Version { found: version });
        }
        let mut session = Session {
            features: from.option(Parser::u64)?,
            protocol_features: from.option(Parser::u64)?,
            ..Session::default()
        };
        for _ in 0..from.count(REGIONS_MAX)? {
            let region = MemoryRegion {
                guest_addr: from.u64()?,
                size: from.u64()?,
                user_addr: from.u64()?,
                mmap_offset: from.u64()?,
            };
            session.memory.push((region, find(memory_name(&region))?));
        }
        session.memory_set = from.flag()?;
        let log = from.option(|from| Ok(LogRegion { size: from.u64()?, offset: from.u64()? }))?;
        session.log = log.map(|region| Ok::<_, SessionError>((region, find("log".to_owned())?))).transpose()?;
        session.log_fd = from.flag()?.then(|| find("log-notify".to_owned())).transpose()?;
        session.backend_req = from.flag()?.then(|| find("backend-req".to_owned())).transpose()?;
        for _ in 0..from.count(CONFIG_WRITES_MAX)? {
            let (offset, flags, length) = (from.u32()?, from.u32()?, from.u32()? as usize);
            if length > ConfigSpace::SIZE_MAX {
                return Err(from.damaged());
            }
            session.config_writes.push(ConfigSpace { offset, flags, bytes: from.take(length)?.to_vec() });
        }
        session.mtu = from.option(Parser::u64)?;
        for index in 0..from.count(RINGS_MAX)? {
            let ring = decode_ring(index, &mut from, &find)?;
            session.rings.push(ring);
        }
        if from.at == bytes.len() { Ok(session) } else { Err(from.damaged()) }
    }
}

fn memory_name(region: &MemoryRegion) -> String {
    format!("mem-{:x}", region.guest_addr)
}

fn encode_ring(ring: &Ring, out: &mut Writer) {
    out.option(ring.size, Writer::u32);
    out.option(ring.addr, |out, addr| {
        out.u32(addr.flags);
        for value in [addr.descriptor, addr.used, addr.available, addr.log] {
            out.u64(value);
        }
    });
    out.option(ring.base, Writer::u32);
    for fd in [ring.kick, ring.call, ring.err] {
        out.flag(fd.is_some());
    }
    out.option(ring.enabled, Writer::flag);
    out.flag(ring.started);
}

fn decode_ring(
    index: u32,
    from: &mut Parser<'_>,
    find: &dyn Fn(String) -> Result<FdSlot, SessionError>,
) -> Result<Ring, SessionError> {
    let size = from.option(Parser::u32)?;
    let addr = from.option(|from| {
        let flags = from.u32()?;
        let (descriptor, used, available, log) = (from.u64()?, from.u64()?, from.u64()?, from.u64()?);
        Ok(VringAddr { index, flags, descriptor, used, available, log })
    })?;
    let base = from.option(Parser::u32)?;
    let fd = |from: &mut Parser<'_>, kind: &str| from.flag()?.then(|| find(format!("ring-{index}-{kind}"))).transpose();
    let (kick, call, err) = (fd(from, "kick")?, fd(from, "call")?, fd(from, "err")?);
    let enabled = from.option(Parser::flag)?;
    Ok(Ring { size, addr, base, kick, call, err, enabled, started: from.flag()? })
}

struct Writer(Vec<u8>);

impl Writer {
    fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    fn flag(&mut self, value: bool) {
        self.0.push(u8::from(value));
    }
    fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            put(self, value);
        }
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn damaged(&self) -> SessionError {
        SessionError::Damaged { at: self.at }
    }
    fn take(&mut self, length: usize) -> Result<&'a [u8], SessionError> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or(self.damaged())?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], SessionError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }
    fn u16(&mut self) -> Result<u16, SessionError> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, SessionError> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, SessionError> {
        self.array().map(u64::from_le_bytes)
    }
    fn flag(&mut self) -> Result<bool, SessionError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(self.damaged()),
        }
    }
    fn option<T>(&mut self, get: impl FnOnce(&mut Self) -> Result<T, SessionError>) -> Result<Option<T>, SessionError> {
        if self.flag()? { get(self).map(Some) } else { Ok(None) }
    }
    fn count(&mut self, max: u32) -> Result<u32, SessionError> {
        let count = self.u32()?;
        if count <= max { Ok(count) } else { Err(self.damaged()) }
    }
}

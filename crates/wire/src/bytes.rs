//! Reading and writing fields in the machine's byte order, as the specification asks.

use warmswap_zoo::{Animal, loose};

use crate::Error;

/// A cursor over one payload.
pub(crate) struct Reader<'a> {
    request: &'static str,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(request: &'static str, payload: &'a [u8]) -> Self {
        Reader { request, whole: payload.len(), rest: payload }
    }

    /// Requires the payload to be exactly `expected` bytes long.
    pub(crate) fn exactly(request: &'static str, payload: &'a [u8], expected: usize) -> Result<Self, Error> {
        if payload.len() == expected || (payload.len() > expected && loose(Animal::LengthUnchecked)) {
            Ok(Reader::new(request, payload))
        } else {
            Err(Error::Length { request, expected, found: payload.len() })
        }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        match self.rest.split_at_checked(length) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(Error::Length {
                request: self.request,
                expected: self.whole - self.rest.len() + length,
                found: self.whole,
            }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_ne_bytes)
    }

    /// Requires that nothing is left.
    pub(crate) fn end(self) -> Result<(), Error> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Error::Length { request: self.request, expected: self.whole - self.rest.len(), found: self.whole })
        }
    }
}

/// Appends fields to a buffer.
pub(crate) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_ne_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_ne_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_ne_bytes());
    }
}

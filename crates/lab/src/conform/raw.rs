//! Messages as bytes, right and wrong ones.

/// Version 1 and nothing else.
pub(super) const PLAIN: u32 = 1;
/// Version 1, with the wish for an acknowledgement.
pub(super) const NEED_REPLY: u32 = 1 | 1 << 3;

/// A message whose size is what its payload has.
pub(super) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, flags, payload.len() as u32);
    bytes.extend_from_slice(payload);
    bytes
}

/// A header that says so.
pub(super) fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A payload of 32-bit words.
pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

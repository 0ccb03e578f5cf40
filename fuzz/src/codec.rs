//! Any bytes with any number of descriptors: decoding never panics, and what it accepts is encoded to the same value.

use warmswap_wire::{BackendRequest, FdSlot, HEADER_SIZE, Header, HeaderFlags, Reply, Request, RequestCode};

/// The first byte is the number of descriptors, then header and payload follow.
pub(crate) fn run(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else { return };
    let fds: Vec<FdSlot> = (0..u32::from(count % 40)).map(FdSlot).collect();
    let Some((header, payload)) = rest.split_first_chunk::<HEADER_SIZE>() else { return };
    let Ok(header) = Header::decode(header) else { return };
    if let Ok(request) = Request::decode(&header, payload, &fds) {
        let (header, payload, fds) = message(|bytes, fds| request.encode(HeaderFlags::empty(), bytes, fds));
        assert_eq!(Request::decode(&header, &payload, &fds), Ok(request));
    }
    if let Ok(request) = BackendRequest::decode(&header, payload, &fds) {
        let (header, payload, fds) = message(|bytes, fds| request.encode(HeaderFlags::empty(), bytes, fds));
        assert_eq!(BackendRequest::decode(&header, &payload, &fds), Ok(request));
    }
    for code in RequestCode::ALL {
        let (id, name, kind) = (*code as u32, code.name(), code.reply_kind());
        if let Ok(reply) = Reply::decode(header.request, name, kind, &header, payload, &fds) {
            let (header, payload, fds) = message(|bytes, fds| reply.encode(id, bytes, fds));
            assert_eq!(Reply::decode(id, name, kind, &header, &payload, &fds), Ok(reply));
        }
    }
}

fn message(encode: impl FnOnce(&mut Vec<u8>, &mut Vec<FdSlot>)) -> (Header, Vec<u8>, Vec<FdSlot>) {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    encode(&mut bytes, &mut fds);
    let (header, payload) = bytes.split_first_chunk::<HEADER_SIZE>().expect("every message has a header");
    let header = Header::decode(header).expect("our own header");
    assert_eq!(header.size as usize, payload.len());
    (header, payload.to_vec(), fds)
}

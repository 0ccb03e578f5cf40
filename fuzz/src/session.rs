//! Any bytes as an encoded session: decoding never panics, and what it accepts is encoded to the same bytes.

use std::cell::RefCell;

use warmswap_core::{Session, SessionError};
use warmswap_wire::FdSlot;

pub(crate) fn run(data: &[u8]) {
    // A table that knows every name, by the order in which it is asked.
    let names = RefCell::new(Vec::new());
    let table = |name: &str| {
        names.borrow_mut().push(name.to_owned());
        u32::try_from(names.borrow().len()).ok().map(FdSlot)
    };
    let Ok(session) = Session::decode(data, &table) else { return };
    assert_eq!(session.encode(), data);
    let asked = names.borrow().clone();
    let told: Vec<String> = session.fds().into_iter().map(|(_, name)| name).collect();
    assert_eq!(told, asked, "the names that are to be kept are the names that are asked for");
    // Without the table every session with a descriptor is refused by the name of the first.
    match (Session::decode(data, &|_| None), asked.first()) {
        (Err(SessionError::Missing { name }), Some(first)) => assert_eq!(name, *first),
        (Ok(same), None) => assert_eq!(same, session),
        (other, first) => panic!("{other:?} where {first:?} is missing"),
    }
}

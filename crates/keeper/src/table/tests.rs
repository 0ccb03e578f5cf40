//! The table against a plain list, with numbers that are only counted.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Which description is open at which number.
#[derive(Default)]
struct Open {
    at: BTreeMap<RawFd, u32>,
    made: u32,
}

impl Open {
    /// A new one, at the lowest free number, as the kernel does it.
    fn receive(&mut self) -> (RawFd, u32) {
        let number = (FIRST..).find(|number| !self.at.contains_key(number)).expect("there is one");
        self.made += 1;
        self.at.insert(number, self.made);
        (number, self.made)
    }
}

impl Numbers for Open {
    fn rename(&mut self, from: RawFd, to: RawFd) -> bool {
        let description = self.at.remove(&from).expect("it is open");
        self.at.insert(to, description);
        true
    }

    fn close(&mut self, fd: RawFd) {
        self.at.remove(&fd).expect("it is closed once");
    }
}

fn names(table: &mut Table) -> String {
    String::from_utf8(table.variable().to_vec()).expect("it is text")
}

#[test]
fn names_and_descriptors_stand_in_the_same_order() {
    let (mut table, mut open) = (Table::new(10), Open::default());
    for name in [&b"a"[..], b"bc", b"", b"a", b"d"] {
        let (fd, _) = open.receive();
        assert_eq!(table.put(name, fd, &mut open), Ok(()));
    }
    assert_eq!(names(&mut table), "LISTEN_FDNAMES=a:bc::a:d\0");
    assert_eq!(table.remove(b"a", &mut open), 2);
    assert_eq!(names(&mut table), "LISTEN_FDNAMES=d:bc:\0");
    assert_eq!(open.at, BTreeMap::from([(3, 5), (4, 2), (5, 3)]));
    assert_eq!(table.remove(b"nobody", &mut open), 0);
    assert_eq!(table.name(4), Some(&b"bc"[..]));
    assert_eq!([2, 6].map(|fd| table.name(fd)), [None, None]);
}

#[test]
fn what_has_no_room_is_closed_and_changes_nothing() {
    let (mut table, mut open) = (Table::new(2), Open::default());
    for _ in 0..2 {
        let (fd, _) = open.receive();
        assert_eq!(table.put(b"x", fd, &mut open), Ok(()));
    }
    let (fd, _) = open.receive();
    assert_eq!(table.put(b"y", fd, &mut open), Err(Full::Descriptors));
    assert_eq!((table.len(), open.at.len()), (2, 2));
}

#[test]
fn the_names_together_never_exceed_one_variable() {
    let (mut table, mut open) = (Table::new(DESCRIPTORS_MAX), Open::default());
    let name = [b'n'; NAME_MAX];
    let full = loop {
        // The number it would be received at, without a search.
        let fd = FIRST + RawFd::try_from(table.len()).expect("a number");
        open.at.insert(fd, 0);
        if let Err(full) = table.put(&name, fd, &mut open) {
            break full;
        }
    };
    assert_eq!(full, Full::Names);
    assert_eq!(table.len(), DESCRIPTORS_MAX / (NAME_MAX + 1));
    assert!(table.variable().len() <= VARIABLE_MAX);
    // The room comes back.
    let held = table.len();
    assert_eq!(table.remove(&name, &mut open), held);
    assert_eq!(table.room_taken, 0);
    assert!(open.at.is_empty() && table.is_empty());
}

#[test]
fn names_with_the_same_digest_are_not_taken_for_each_other() {
    let (mut table, mut open) = (Table::new(4), Open::default());
    for name in [&b"one"[..], b"two", b"one"] {
        let (fd, _) = open.receive();
        assert_eq!(table.put(name, fd, &mut open), Ok(()));
    }
    // As if every name had it.
    table.digests.fill(digest(b"one"));
    assert_eq!(table.remove(b"one", &mut open), 2);
    assert_eq!(names(&mut table), "LISTEN_FDNAMES=two\0");
    assert_eq!(open.at, BTreeMap::from([(3, 2)]));
}

#[derive(Clone, Debug)]
enum Step {
    /// So many at once under a name.
    Put(u8, u8),
    Remove(u8),
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn whatever_is_put_and_removed_the_table_is_a_list(
        steps in prop::collection::vec(
            prop_oneof![3 => (0..6_u8, 1..5_u8).prop_map(|(n, c)| Step::Put(n, c)), 1 => (0..6_u8).prop_map(Step::Remove)],
            0..60,
        )
    ) {
        const CAPACITY: usize = 12;
        let (mut table, mut open) = (Table::new(CAPACITY), Open::default());
        let mut list: Vec<(Vec<u8>, u32)> = Vec::new();
        for step in steps {
            match step {
                Step::Put(name, count) => {
                    let name = vec![b'a' + name; name.into()];
                    let received: Vec<_> = (0..count).map(|_| open.receive()).collect();
                    for (fd, description) in received {
                        let result = table.put(&name, fd, &mut open);
                        prop_assert_eq!(result.is_ok(), list.len() < CAPACITY);
                        if result.is_ok() {
                            list.push((name.clone(), description));
                        }
                    }
                }
                Step::Remove(name) => {
                    let name = vec![b'a' + name; name.into()];
                    let before = list.len();
                    list.retain(|held| held.0 != name);
                    prop_assert_eq!(table.remove(&name, &mut open), before - list.len());
                }
            }
            // Numbers are dense, and each name has the descriptions that were put under it.
            let numbers: Vec<RawFd> = open.at.keys().copied().collect();
            let dense: Vec<RawFd> = (0..list.len()).map(|at| FIRST + RawFd::try_from(at).expect("a number")).collect();
            prop_assert_eq!(numbers, dense);
            let mut held: Vec<_> =
                open.at.iter().map(|(fd, description)| (table.name(*fd).expect("held").to_vec(), *description)).collect();
            let mut expected = list.clone();
            held.sort();
            expected.sort();
            prop_assert_eq!(held, expected);
        }
    }
}

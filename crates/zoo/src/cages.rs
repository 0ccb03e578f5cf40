//! Which animals are loose, and where.

use std::cell::Cell;
use std::sync::LazyLock;

use crate::Animal;

/// The environment variable that sets an animal loose in every thread of a process: its name.
pub const VARIABLE: &str = "WARMSWAP_ZOO";

thread_local! {
    static HERE: Cell<Option<Animal>> = const { Cell::new(None) };
}

static EVERYWHERE: LazyLock<Option<Animal>> = LazyLock::new(|| {
    let id = std::env::var(VARIABLE).ok().filter(|id| !id.is_empty())?;
    let known = Animal::ALL.iter().copied().find(|animal| animal.id() == id);
    // A name that is wrong must not pass for an animal that nothing catches.
    Some(known.unwrap_or_else(|| panic!("{VARIABLE}={id}: there is no such animal")))
});

/// Whether an animal is loose in this thread.
#[inline]
#[must_use]
pub fn loose(animal: Animal) -> bool {
    HERE.get() == Some(animal) || *EVERYWHERE == Some(animal)
}

/// Sets an animal loose in this thread until what is returned is dropped. One at a time.
#[must_use = "it is back in its cage when this is dropped"]
pub fn release(animal: Animal) -> Loose {
    assert_eq!(HERE.replace(Some(animal)), None, "one animal at a time");
    Loose(std::marker::PhantomData)
}

/// An animal that is loose in this thread.
#[derive(Debug)]
pub struct Loose(std::marker::PhantomData<*const ()>);

impl Drop for Loose {
    fn drop(&mut self) {
        HERE.set(None);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn an_animal_is_loose_in_its_thread_until_it_is_caught() {
        assert!(!loose(Animal::FenceSkipped));
        {
            let _loose = release(Animal::FenceSkipped);
            assert!(loose(Animal::FenceSkipped) && !loose(Animal::KickLost));
            assert!(!std::thread::spawn(|| loose(Animal::FenceSkipped)).join().expect("it does not panic"));
        }
        assert!(!loose(Animal::FenceSkipped));
    }

    #[test]
    fn animals_have_names_of_their_own() {
        let ids: BTreeSet<&str> = Animal::ALL.iter().map(|animal| animal.id()).collect();
        assert_eq!(ids.len(), Animal::ALL.len());
    }
}

//! Requests are linear: what was taken from a ring is completed, or given up by name.

/// A request that was taken from its ring and is owed. Dropping it ends the process: a request that is forgotten is I/O that the guest
/// waits for and never gets, and nobody would notice.
#[derive(Debug)]
#[must_use = "a request is completed, or given up by name"]
pub(crate) struct Token {
    head: u16,
}

impl Token {
    /// The request at this head was taken.
    pub(crate) fn new(head: u16) -> Self {
        Token { head }
    }

    /// Its completion has been published.
    pub(crate) fn completed(self) {
        std::mem::forget(self);
    }

    /// It is not completed by us: whoever serves the ring next finds it in the ring, or in the in-flight region.
    pub(crate) fn left_to_the_next(self) {
        std::mem::forget(self);
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("the request at head {} was dropped without being completed", self.head);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic = "head 7 was dropped"]
    fn a_request_that_is_dropped_is_no_silent_loss() {
        drop(Token::new(7));
    }

    #[test]
    fn one_that_is_completed_or_left_is_in_order() {
        Token::new(1).completed();
        Token::new(2).left_to_the_next();
    }
}

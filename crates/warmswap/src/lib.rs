//! warmswap.

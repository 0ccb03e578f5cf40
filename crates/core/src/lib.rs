//! warmswap core.

//! Scripts of events in, expected actions out.

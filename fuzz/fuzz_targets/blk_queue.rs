#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warmswap_blk::fuzzing::run(data));

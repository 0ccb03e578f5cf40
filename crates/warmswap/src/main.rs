//! The warmswap program.

use std::process::ExitCode;

fn main() -> ExitCode {
    warmswap::cli::main(std::env::args_os())
}

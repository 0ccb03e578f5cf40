//! Bytes as they stand in JSON: two digits each.

/// Bytes as digits.
pub(crate) fn encode(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut hex = String::with_capacity(2 * bytes.len());
    // A string takes what it is given.
    bytes.iter().for_each(|byte| _ = write!(hex, "{byte:02x}"));
    hex
}

/// Digits as bytes, or why they are none.
pub(crate) fn decode(hex: &str) -> Result<Vec<u8>, String> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return Err("not in hexadecimal".to_owned());
    }
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16);
    let bytes: Result<Vec<u8>, _> = (0..hex.len()).step_by(2).map(byte).collect();
    bytes.map_err(|error| format!("not in hexadecimal: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_anything_else_is_refused() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&bytes)), Ok(bytes));
        for wrong in ["0", "0g", "é0"] {
            assert!(decode(wrong).is_err(), "{wrong}");
        }
    }
}

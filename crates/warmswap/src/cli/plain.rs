//! Text for a terminal. What came over a socket, out of a file or from the names in a directory was written by somebody else, and a
//! terminal obeys what it reads: nothing of it is printed but through here.

use serde_json::Value;

/// What a terminal may take for more than a character: controls, and what changes the direction or the place of others unseen.
fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Text of one line that a terminal takes for nothing else.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if is_hostile(c) { ' ' } else { c }).collect()
}

/// Text of many lines: each as [`clean`] leaves it.
pub(super) fn clean_lines(text: &str) -> String {
    text.chars().map(|c| if is_hostile(c) && c != '\n' { ' ' } else { c }).collect()
}

/// Cleans every text in a value, and the names of its members.
pub(super) fn clean_value(value: &mut Value) {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
        Value::String(text) => *text = clean(text),
        Value::Array(values) => values.iter_mut().for_each(clean_value),
        Value::Object(members) => {
            let cleaned = std::mem::take(members).into_iter().map(|(name, mut value)| {
                clean_value(&mut value);
                (clean(&name), value)
            });
            *members = cleaned.collect();
        }
    }
}

/// JSON of one line that means the same and is plain: outside of strings there is nothing but white space to be cleaned, and within them
/// everything can be told by its number.
pub(super) fn json_line(json: &str) -> String {
    let mut line = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\n' | '\r' | '\t' => line.push(' '),
            c if is_hostile(c) => {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().for_each(|unit| line.push_str(&format!("\\u{unit:04x}")));
            }
            c => line.push(c),
        }
    }
    line
}

/// Says something beside the output.
pub(super) fn say(text: &str) {
    eprintln!("warmswap: {}", clean_lines(text));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const HOSTILE: &str =
        "\u{1b}[2J\u{7}\r\n\t\u{9b}31m\u{85}\u{7f}\u{202e}\u{2066}\u{200f}\u{61c}\u{2028}\u{feff}\u{e0041}";

    #[test]
    fn nothing_is_left_that_a_terminal_obeys() {
        assert_eq!(clean(HOSTILE).replace(' ', ""), "[2J31m");
        assert_eq!(clean("Gerät 7: ▂▅█ 磁盘"), "Gerät 7: ▂▅█ 磁盘");
        assert_eq!(clean_lines("one\ntwo\u{1b}\r"), "one\ntwo  ");
        let mut value = json!({HOSTILE: [HOSTILE, 1, null, {"a": HOSTILE}]});
        clean_value(&mut value);
        assert!(!value.to_string().chars().any(is_hostile), "{value}");
    }

    proptest! {
        #[test]
        fn json_stays_what_it_says(text in "\\PC*|(.|[\u{0}-\u{ff}\u{2000}-\u{206f}\u{e0000}-\u{e007f}])*") {
            let value = json!({ text.clone(): [text, 1.5, null] });
            for sent in [value.to_string(), format!("{value:#}")] {
                let line = json_line(&sent);
                prop_assert!(!line.chars().any(is_hostile));
                prop_assert_eq!(&serde_json::from_str::<Value>(&line).expect("it is JSON"), &value);
            }
        }

        #[test]
        fn every_text_is_clean(text in "(.|[\u{0}-\u{ff}\u{2000}-\u{206f}\u{e0000}-\u{e007f}])*") {
            prop_assert!(!clean(&text).chars().any(is_hostile));
            prop_assert!(!clean_lines(&text).chars().any(|c| is_hostile(c) && c != '\n'));
        }
    }
}

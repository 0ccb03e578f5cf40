//! `warmswap daemon` and `warmswap check-config`: many devices in one process, from a file.
//!
//! ```toml
//! control = "/run/warmswap"            # what all devices share
//!
//! [device.disk0]                       # one device: the options of `guard` by their names
//! socket = "/run/disk0.sock"
//! disk = "/srv/disk0.raw"
//!
//! [device.net0]
//! socket = "/run/net0.sock"
//! type = "net"
//! command = ["testpmd-wrapper", "{socket}"]
//! ```
//! Files of `FILE.d` that end in `.toml` add to it, in the order of their names. What stands twice is an error, wherever it stands: nobody
//! has to know which one wins.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use toml::{Spanned, Value};

use super::{Failure, guard};
use crate::driver::{Keeping, Proposal};

/// Options that all devices of a process share.
const SHARED: [&str; 10] =
    ["control", "journal", "quiet", "store", "tick-ms", "window-ms", "offload-cpus", "hook", "no-profile", "model"];

/// Options of `warmswap daemon` and `warmswap check-config`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file; files in FILE.d that end in .toml add to it
    #[arg(long, value_name = "FILE", default_value = "/etc/warmswap/warmswap.toml")]
    config: PathBuf,
}

/// Keys with their values, and where they stand.
type Table = BTreeMap<Spanned<String>, Spanned<Value>>;

/// One file of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn read(path: PathBuf) -> Result<Self, String> {
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Source { path, text })
    }

    /// A place in the file, as editors have it.
    fn place(&self, at: usize) -> String {
        let before = self.text.get(..at).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        format!("{}:{line}:{column}", self.path.display())
    }

    fn tables(&self) -> Result<(Table, BTreeMap<Spanned<String>, Table>), String> {
        #[derive(serde::Deserialize)]
        struct Devices {
            #[serde(default)]
            device: BTreeMap<Spanned<String>, Table>,
        }
        let fail = |error: toml::de::Error| {
            let place = self.place(error.span().map_or(0, |span| span.start));
            format!("{place}: {}", error.message())
        };
        let shared: Table = toml::from_str(&self.text).map_err(fail)?;
        let devices: Devices = toml::from_str(&self.text).map_err(fail)?;
        Ok((shared.into_iter().filter(|(key, _)| key.get_ref() != "device").collect(), devices.device))
    }
}

/// A device: its options as words, and where each of them comes from.
struct Device {
    name: String,
    words: Vec<String>,
    /// Place of the device, and of each of its keys.
    place: String,
    places: BTreeMap<String, String>,
}

/// Everything that the files say, as far as it can be understood one by one.
#[derive(Default)]
struct Said {
    /// Words of an option that all share, and where it stands.
    shared: BTreeMap<String, (Vec<String>, String)>,
    devices: Vec<Device>,
    wrong: Vec<String>,
}

impl Said {
    fn add(&mut self, source: &Source) {
        match source.tables() {
            Ok((shared, devices)) => {
                shared.into_iter().for_each(|(key, value)| self.share(source, &key, &value));
                devices.iter().for_each(|(name, table)| self.device(source, name, table));
            }
            Err(error) => self.wrong.push(error),
        }
    }

    fn share(&mut self, source: &Source, key: &Spanned<String>, value: &Spanned<Value>) {
        let (place, name) = (source.place(key.span().start), key.get_ref());
        if !SHARED.contains(&name.as_str()) {
            self.wrong.push(format!("{place}: {name} is not known here; shared are {}", SHARED.join(", ")));
            return;
        }
        match (words_of(name, value.get_ref()), self.shared.get(name)) {
            (Err(why), _) => self.wrong.push(format!("{}: {why}", source.place(value.span().start))),
            (Ok(_), Some((_, first))) => self.wrong.push(format!("{place}: {name} stands at {first} already")),
            (Ok(words), None) => _ = self.shared.insert(name.clone(), (words, place)),
        }
    }

    fn device(&mut self, source: &Source, name: &Spanned<String>, table: &Table) {
        let device = device_of(source, name, table, &mut self.wrong);
        let Device { name, place, .. } = &device;
        match self.devices.iter().find(|known| known.name == *name) {
            Some(first) => self.wrong.push(format!("{place}: device {name} stands at {} already", first.place)),
            None => self.devices.push(device),
        }
    }
}

/// Everything that a configuration says, or everything that is wrong with it.
fn devices(sources: &[Source]) -> Result<Vec<(Device, guard::Args)>, Vec<String>> {
    let mut said = Said::default();
    sources.iter().for_each(|source| said.add(source));
    let Said { shared, devices, mut wrong } = said;
    if let (Some(first), true, true) = (sources.first(), devices.is_empty(), wrong.is_empty()) {
        wrong.push(format!("{}: there is no device in it", first.path.display()));
    }
    let shared: Vec<String> = shared.into_values().flat_map(|(words, _)| words).collect();
    let mut parsed = Vec::new();
    for device in devices {
        match device.parse(&shared) {
            Ok(args) => parsed.push((device, args)),
            Err(why) => wrong.push(format!("{}: device {}: {why}", device.place_of(&why), device.name)),
        }
    }
    if wrong.is_empty() { Ok(parsed) } else { Err(wrong) }
}

impl Device {
    /// Its options and those that all share, as `guard` takes them.
    fn parse(&self, shared: &[String]) -> Result<guard::Args, String> {
        // What follows -- is the backend's, so its own come last.
        let args = guard::parse([shared, &self.words].concat()).map_err(|error| {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        })?;
        guard::check(args.clone()).map(|()| args)
    }

    /// Where what is wrong stands: at the option that it names, or at the device.
    fn place_of(&self, why: &str) -> &str {
        let named = self.places.iter().find(|(key, _)| {
            why.split(|letter: char| letter.is_whitespace() || letter == '\'' || letter == ':')
                .any(|word| word == format!("--{key}"))
        });
        named.map_or(self.place.as_str(), |(_, place)| place.as_str())
    }
}

fn sources(config: &Path) -> Result<Vec<Source>, String> {
    let mut sources = vec![Source::read(config.to_path_buf())?];
    let mut directory = config.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(format!("{}: {error}", directory.display())),
    };
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{}: {error}", directory.display()))?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    for path in paths {
        sources.push(Source::read(path)?);
    }
    Ok(sources)
}

fn device_of(source: &Source, name: &Spanned<String>, table: &Table, wrong: &mut Vec<String>) -> Device {
    let mut words = vec!["--name".to_owned(), name.get_ref().clone()];
    let mut places = BTreeMap::new();
    let mut command = Vec::new();
    for (key, value) in table {
        let place = source.place(key.span().start);
        match key.get_ref().as_str() {
            "command" => match texts(value.get_ref()) {
                Some(texts) => command = texts,
                None => wrong.push(format!("{}: command is a list of texts", source.place(value.span().start))),
            },
            "name" => wrong.push(format!("{place}: the name of a device stands in the brackets")),
            shared if SHARED.contains(&shared) => {
                wrong.push(format!("{place}: {shared} is of all devices: write it above the first of them"));
            }
            key => match words_of(key, value.get_ref()) {
                Ok(more) => words.extend(more),
                Err(why) => wrong.push(format!("{}: {why}", source.place(value.span().start))),
            },
        }
        places.insert(key.get_ref().clone(), place);
    }
    if !command.is_empty() {
        words.push("--".to_owned());
        words.extend(command);
    }
    Device { name: name.get_ref().clone(), words, place: source.place(name.span().start), places }
}

/// An option as words of a command line.
fn words_of(key: &str, value: &Value) -> Result<Vec<String>, String> {
    let option = format!("--{key}");
    match value {
        Value::Boolean(true) => Ok(vec![option]),
        Value::Boolean(false) => Ok(Vec::new()),
        Value::String(text) => Ok(vec![format!("{option}={text}")]),
        Value::Integer(number) => Ok(vec![format!("{option}={number}")]),
        other => Err(format!("{key} is a text, a number, true or false, not {}", kind_of(other))),
    }
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|word| word.as_str().map(str::to_owned)).collect()
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Float(_) => "a number with a fraction",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
        _ => "that",
    }
}

fn refuse(wrong: &[String]) -> Failure {
    Failure::new(2, wrong.join("\n"))
}

fn arguments(devices: Vec<(Device, guard::Args)>) -> Vec<guard::Args> {
    devices.into_iter().map(|(_, args)| args).collect()
}

/// Reads the configuration again. Whatever goes on in it must stay what it is.
fn reread(config: &Path, now: &[guard::Args]) -> Result<Proposal, String> {
    let sources = sources(config)?;
    let devices = devices(&sources).map_err(|wrong| wrong.join("\n"))?;
    let changed = devices.iter().filter_map(|(device, new)| {
        let old = now.iter().find(|old| old.name() == new.name())?;
        let option = guard::must_stay(old, new)?;
        let place = device.places.get(option).unwrap_or(&device.place);
        let name = &device.name;
        Some(format!(
            "{place}: device {name} is in use: its {option} cannot be changed; remove the device, then add it anew"
        ))
    });
    let changed: Vec<String> = changed.collect();
    if !changed.is_empty() {
        return Err(changed.join("\n"));
    }
    let text = serde_json::to_string(&sources).map_err(|error| error.to_string())?;
    Ok(Proposal { text, devices: devices.into_iter().map(|(device, _)| device.name).collect() })
}

/// Guards every device of a configuration until a signal: that of the files, or the one that was in force when a process before this one
/// ended.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let keeping = Keeping::begin()?;
    let kept = keeping.as_ref().map(|it| it.borrow_mut().configuration()).transpose()?.flatten();
    let undone = kept.as_ref().is_some_and(|kept| kept.undone);
    let read = match &kept {
        Some(kept) => serde_json::from_str(&kept.text).map_err(|error| format!("the configuration in force: {error}")),
        None => sources(&args.config),
    };
    let sources: Vec<Source> = read.map_err(|error| refuse(&[error]))?;
    let devices = arguments(devices(&sources).map_err(|wrong| refuse(&wrong))?);
    if let (Some(keeping), None) = (&keeping, kept) {
        let text = serde_json::to_string(&sources).map_err(|error| Failure::new(1, error.to_string()))?;
        keeping.borrow_mut().set_configuration(&text)?;
    }
    let (config, now) = (args.config.clone(), devices.clone());
    let reread: Arc<crate::driver::Reread> = Arc::new(move || reread(&config, &now));
    guard::guard(devices, guard::Begun { keeping, reread: Some(reread), undone })
}

/// Says whether a configuration could be used, and what is wrong with it if not.
pub(super) fn check(args: &Args) -> Result<u8, Failure> {
    let sources = sources(&args.config).map_err(|error| refuse(&[error]))?;
    let devices = devices(&sources).map_err(|wrong| refuse(&wrong))?;
    println!("{}: {} devices, nothing wrong", args.config.display(), devices.len());
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn with(files: &[(&str, &str)]) -> Self {
            static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let dir = std::env::temp_dir().join(format!("warmswap-config-{}-{number}", std::process::id()));
            for (name, text) in files {
                let path = dir.join(name);
                std::fs::create_dir_all(path.parent().expect("in a directory")).expect("a directory");
                std::fs::write(path, text).expect("a file");
            }
            Dir(dir)
        }

        fn wrong(&self) -> Vec<String> {
            let sources = sources(&self.0.join("w.toml")).expect("it is there");
            let Err(wrong) = devices(&sources) else { panic!("it is accepted") };
            let prefix = format!("{}/", self.0.display());
            wrong.into_iter().map(|text| text.replace(&prefix, "")).collect()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _left = std::fs::remove_dir_all(&self.0);
        }
    }

    const ONE: &str = "[device.a]\nsocket = \"/run/a.sock\"\ncommand = [\"backend\", \"{socket}\"]\n";

    #[test]
    fn devices_come_from_the_file_and_its_drop_ins() {
        let two = ONE.replace("device.a", "device.b").replace("a.sock", "b.sock");
        let dir = Dir::with(&[
            ("w.toml", &format!("quiet = true\ntick-ms = 200\n{ONE}hang-ms = 300\nobserve = true\n")),
            ("w.toml.d/b.toml", &two),
            ("w.toml.d/readme.txt", "no part of it"),
        ]);
        let sources = sources(&dir.0.join("w.toml")).expect("they are there");
        assert_eq!(devices(&sources).map(|devices| devices.len()).map_err(|wrong| wrong.join("\n")), Ok(2));
    }

    #[test]
    fn what_a_guest_uses_stays_what_it_is() {
        let changed = |before: &str, after: &str| {
            let dir = Dir::with(&[("w.toml", before)]);
            let config = dir.0.join("w.toml");
            let now = arguments(
                devices(&sources(&config).expect("it is there")).map_err(|it| it.join("\n")).expect("it is right"),
            );
            std::fs::write(&config, after).expect("a file");
            let prefix = format!("{}/", dir.0.display());
            reread(&config, &now).map(|proposal| proposal.devices).map_err(|wrong| wrong.replace(&prefix, ""))
        };
        let two = format!("{ONE}{}", ONE.replace("device.a", "device.b").replace("a.sock", "b.sock"));
        assert_eq!(changed(ONE, &two), Ok(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(changed(&two, ONE), Ok(vec!["a".to_owned()]));
        assert_eq!(changed(ONE, &format!("{ONE}hang-ms = 700\n")), Ok(vec!["a".to_owned()]));
        assert_eq!(changed(ONE, &ONE.replace("[\"backend\"", "[\"newer\"")), Ok(vec!["a".to_owned()]));
        let stays = |option: &str| {
            format!("device a is in use: its {option} cannot be changed; remove the device, then add it anew")
        };
        let refused: [(String, u8, &str); 4] = [
            (ONE.replace("a.sock", "b.sock"), 2, "socket"),
            (ONE.replace("{socket}\"", "{socket}\", \"other.raw\""), 3, "command"),
            (format!("{ONE}type = \"net\"\n"), 4, "type"),
            (format!("control = \"/elsewhere\"\n{ONE}"), 2, "control"),
        ];
        for (after, line, option) in refused {
            let column = if option == "control" { 9 } else { 1 };
            assert_eq!(changed(ONE, &after), Err(format!("w.toml:{line}:{column}: {}", stays(option))));
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_file_line_and_column() {
        let cases: [(&str, &[&str]); 9] = [
            ("[device.a]\nsocket = 3 4\n", &["w.toml:2:10: "]),
            ("color = 1\n[device.a]\n", &["w.toml:1:1: color is not known here"]),
            (
                "[device.a]\nsocket = \"/a\"\ncommand = [\"b\"]\n",
                &["w.toml:1:9: device a: the backend's command line needs {socket}"],
            ),
            (&format!("{ONE}hang-ms = 1\n"), &["w.toml:4:1: device a: invalid value '1' for '--hang-ms"]),
            (&format!("{ONE}hang-s = 1\n"), &["w.toml:4:1: device a: unexpected argument '--hang-s'"]),
            (&format!("{ONE}journal = \"j\"\n"), &["w.toml:4:1: journal is of all devices"]),
            (
                &format!("{ONE}  hang-ms = [1]\n"),
                &["w.toml:4:13: hang-ms is a text, a number, true or false, not a list"],
            ),
            (
                &format!("{ONE}command = 3\n").replacen("command = [\"backend\", \"{socket}\"]\n", "", 1),
                &["w.toml:3:11: command is a list of texts"],
            ),
            ("", &["w.toml: there is no device in it"]),
        ];
        for (text, expected) in cases {
            let dir = Dir::with(&[("w.toml", text)]);
            let wrong = dir.wrong();
            let found = expected.iter().all(|start| wrong.iter().any(|line| line.starts_with(start)));
            assert!(found, "{text:?}: expected {expected:?}, found {wrong:?}");
        }
        let twice = Dir::with(&[
            ("w.toml", &format!("quiet = true\n{ONE}")),
            ("w.toml.d/1.toml", &format!("quiet = true\n{ONE}")),
        ]);
        assert_eq!(
            twice.wrong(),
            [
                "w.toml.d/1.toml:1:1: quiet stands at w.toml:1:1 already",
                "w.toml.d/1.toml:2:9: device a stands at w.toml:2:9 already",
            ]
        );
    }
}

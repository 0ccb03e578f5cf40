//! Debian's package tools: what is needed of them, and nothing of it where nothing is missing.

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::shell;

const SOURCES: &str = "/etc/apt/sources.list.d";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/warmswap-backports.sources";

/// A place packages come from, as the machine's configuration names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// Installs packages: `plain` from the release, `newer` from its backports. Says what it runs.
pub(crate) fn install(plain: &[&str], newer: &[&str]) -> anyhow::Result<()> {
    let suite = format!("{}-backports", codename()?);
    if !newer.is_empty() {
        // Before the lists are fetched, so that they are fetched once, with this source among them.
        enable_backports(&suite)?;
    }
    refresh_once()?;
    for (packages, options) in [(plain, &[] as &[&str]), (newer, &["--target-release", &suite])] {
        if packages.is_empty() {
            continue;
        }
        let mut command = as_root("apt-get")?;
        command.args(["install", "--yes", "--no-install-recommends"]).args(options).args(packages);
        println!("  {}", shell::spelled(&command));
        shell::run(&mut command)?;
    }
    Ok(())
}

/// Downloads packages (`name` or `name=version`) and unpacks them, installing nothing.
pub(crate) fn unpack(packages: &[String], target: &Path) -> anyhow::Result<()> {
    let archives = target.with_extension("packages");
    std::fs::create_dir_all(&archives)?;
    let mut command = Command::new("apt-get");
    // Downloads into the cache run as the caller, who owns it; apt's own user could not write there.
    command.args(["-o", "APT::Sandbox::User=root", "--quiet", "download"]).args(packages).current_dir(&archives);
    println!("  apt-get download {}", packages.join(" "));
    shell::run(&mut command)?;
    for entry in std::fs::read_dir(&archives)? {
        shell::run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(target))?;
    }
    std::fs::remove_dir_all(&archives)?;
    Ok(())
}

/// The newest version of `package` on offer that begins with `prefix`, the epoch aside.
pub(crate) fn version(package: &str, prefix: &str) -> Option<String> {
    let table = shell::output(Command::new("apt-cache").args(["madison", package]))?;
    let versions = table.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    let fits = |version: &&str| version.split_once(':').map_or(*version, |(_, rest)| rest).starts_with(prefix);
    versions.into_iter().find(fits).map(str::to_owned)
}

/// The packages one depends on, first alternatives only; `package` may carry a version.
pub(crate) fn dependencies(package: &str) -> Vec<String> {
    let text =
        shell::output(Command::new("apt-cache").args(["show", "--no-all-versions", package])).unwrap_or_default();
    let fields =
        text.lines().filter_map(|line| line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("Pre-Depends: ")));
    let names = fields.flat_map(|field| field.split(',')).filter_map(|clause| {
        let name = clause.split('|').next()?.split_whitespace().next()?;
        Some(name.split(':').next()?.to_owned())
    });
    names.collect()
}

/// Whether a package is installed.
pub(crate) fn installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

/// Fetches the package lists, at most once in a run.
pub(crate) fn refresh_once() -> anyhow::Result<()> {
    static DONE: std::sync::Once = std::sync::Once::new();
    let mut result = Ok(());
    DONE.call_once(|| {
        result = as_root("apt-get").and_then(|mut command| {
            println!("  apt-get update");
            shell::run(command.args(["update", "--quiet"]))
        });
    });
    result
}

/// Adds the backports of the installed release, from where the release itself comes.
fn enable_backports(suite: &str) -> anyhow::Result<()> {
    let sources = configured()?;
    if sources.iter().any(|source| source.suites.iter().any(|known| known == suite)) {
        return Ok(());
    }
    let text = backports_entry(&sources, suite).context("no configured package source to derive the backports from")?;
    println!("  writing {BACKPORTS_FILE}:\n    {}", text.trim().replace('\n', "\n    "));
    let staged = std::env::temp_dir().join(format!("warmswap-backports-{}", std::process::id()));
    std::fs::write(&staged, text)?;
    let written = shell::run(as_root("install")?.args(["-m", "0644"]).arg(&staged).arg(BACKPORTS_FILE));
    std::fs::remove_file(&staged)?;
    written
}

/// The configuration for `suite`, in the image of the source of the release it belongs to.
fn backports_entry(sources: &[Source], suite: &str) -> Option<String> {
    let release = suite.strip_suffix("-backports")?;
    let main = |source: &&Source| {
        source.suites.iter().any(|known| known == release) && source.components.iter().any(|part| part == "main")
    };
    let source = sources.iter().find(main)?;
    let signed_by = source.signed_by.as_ref().map_or_else(String::new, |key| format!("Signed-By: {key}\n"));
    Some(format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n{signed_by}", source.uri))
}

/// Every configured source.
fn configured() -> anyhow::Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
    files.extend(std::fs::read_dir(SOURCES).into_iter().flatten().flatten().map(|entry| entry.path()));
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(one_line)),
            Some("sources") => sources.extend(stanzas(&text)),
            _ => {}
        }
    }
    Ok(sources)
}

/// A source in the older form: `deb [options] uri suite component…`.
fn one_line(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned);
    Some(Source { uri, suites: vec![suite], components: words.collect(), signed_by })
}

/// Sources in the newer form: paragraphs of fields.
fn stanzas(text: &str) -> Vec<Source> {
    let is_comment = |line: &&str| !line.trim_start().starts_with('#');
    let text: Vec<&str> = text.lines().filter(is_comment).collect();
    text.split(|line| line.trim().is_empty()).filter_map(stanza).collect()
}

fn stanza(lines: &[&str]) -> Option<Source> {
    let field = |name: &str| {
        let line = lines.iter().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim())
    };
    let words = |name: &str| field(name).map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    if !words("types")?.iter().any(|kind| kind == "deb") || field("enabled").is_some_and(|value| value == "no") {
        return None;
    }
    Some(Source {
        uri: words("uris")?.into_iter().next()?,
        suites: words("suites")?,
        components: words("components")?,
        // A key may also be written out in the field; that form has an empty first line and is not copied.
        signed_by: field("signed-by").filter(|key| key.starts_with('/')).map(str::to_owned),
    })
}

/// The name of the installed release.
fn codename() -> anyhow::Result<String> {
    let text = std::fs::read_to_string("/etc/os-release").context("reading the release's name")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("this is no Debian release")?.trim_matches('"').to_owned())
}

/// A command with the rights to change the system.
fn as_root(program: &str) -> anyhow::Result<Command> {
    let is_root = shell::output(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0");
    let mut command = if is_root {
        Command::new(program)
    } else {
        anyhow::ensure!(shell::has("sudo"), "{program} needs root: run `cargo xtask setup` once as root");
        let mut sudo = Command::new("sudo");
        sudo.arg(program);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW_FORM: &str = "# a comment\nTypes: deb\nURIs: http://mirror.example/debian\n\
        Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/key.gpg\n\n\
        Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n";

    #[test]
    fn the_backports_come_from_where_the_release_comes() {
        let sources = stanzas(NEW_FORM);
        assert_eq!(sources.len(), 2);
        let entry = backports_entry(&sources, "bookworm-backports").expect("the release is among them");
        assert_eq!(
            entry,
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/key.gpg\n"
        );
        assert_eq!(backports_entry(&sources, "trixie-backports"), None);
    }

    #[test]
    fn the_older_form_is_read_with_and_without_options() {
        let plain = one_line("deb http://mirror.example/debian bookworm main contrib").expect("a source");
        assert_eq!((plain.uri.as_str(), plain.components.len()), ("http://mirror.example/debian", 2));
        let signed = one_line("deb [arch=amd64 signed-by=/k.gpg] http://m.example/d bookworm main").expect("a source");
        assert_eq!(signed.signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(one_line("# deb http://mirror.example/debian bookworm main"), None);
        assert_eq!(one_line("deb-src http://mirror.example/debian bookworm main"), None);
    }
}

//! `belay keygen`: the two key pairs by which two hosts know each other.

use crate::exit::Exit;
use belay_transport::session::{KeyPair, SessionError, keygen};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Makes one certificate and key for each of two hosts.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  belay keygen                                 source.key, source.crt, destination.key, destination.crt, here
  belay keygen --out keys --source node7 --destination node9")]
pub struct KeygenArgs {
    /// Where the files go; it is made if it does not exist. Files that exist are never replaced
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// Name of the host that sends
    #[arg(long, value_name = "NAME", default_value = "source", value_parser = name)]
    pub source: String,
    /// Name of the host that receives
    #[arg(long, value_name = "NAME", default_value = "destination", value_parser = name)]
    pub destination: String,
}

/// A host's name becomes a file's.
fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !text.is_empty() && !text.starts_with(['.', '-']) && text.len() <= 64 && text.chars().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("a name has up to 64 letters, digits, dots, dashes and underscores, and begins with none of the last three"
            .into())
    }
}

#[derive(Debug, thiserror::Error)]
enum KeygenError {
    #[error("both hosts are called {0}; each needs a name of its own")]
    SameName(String),
    #[error("{0} exists, and a key is never replaced")]
    Exists(PathBuf),
    #[error("make {0}")]
    Directory(PathBuf, #[source] std::io::Error),
    #[error("no key pair for {name}")]
    Keys { name: String, source: SessionError },
}

/// Runs it: the files, and on stdout what goes where.
pub fn run(args: KeygenArgs) -> Exit {
    match make(&args) {
        Ok((source, destination)) => {
            let told = tell(&mut std::io::stdout().lock(), &source, &destination);
            if told.is_ok() { Exit::Done } else { Exit::Failed }
        }
        Err(error) => {
            crate::complain(&error, advice(&error));
            match error {
                KeygenError::SameName(_) | KeygenError::Exists(_) => Exit::Usage,
                KeygenError::Directory(..) | KeygenError::Keys { .. } => Exit::Failed,
            }
        }
    }
}

fn advice(error: &KeygenError) -> &'static str {
    match error {
        KeygenError::SameName(_) => "give --source and --destination",
        KeygenError::Exists(_) => "give another --out or other names, or move the old pair away",
        KeygenError::Directory(..) | KeygenError::Keys { .. } => "give an --out where this user may write",
    }
}

fn make(args: &KeygenArgs) -> Result<(KeyPair, KeyPair), KeygenError> {
    if args.source == args.destination {
        return Err(KeygenError::SameName(args.source.clone()));
    }
    std::fs::create_dir_all(&args.out).map_err(|source| KeygenError::Directory(args.out.clone(), source))?;
    // Looked at before the first is made, so that a refusal leaves no half behind.
    for name in [&args.source, &args.destination] {
        for kind in ["key", "crt"] {
            let path = args.out.join(format!("{name}.{kind}"));
            if path.symlink_metadata().is_ok() {
                return Err(KeygenError::Exists(path));
            }
        }
    }
    let pair =
        |name: &String| keygen(&args.out, name).map_err(|source| KeygenError::Keys { name: name.clone(), source });
    Ok((pair(&args.source)?, pair(&args.destination)?))
}

fn tell(out: &mut dyn Write, source: &KeyPair, destination: &KeyPair) -> std::io::Result<()> {
    let show = |path: &Path| path.display().to_string();
    let file = |path: &Path| path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    for (role, own, other) in [("source", source, "destination"), ("destination", destination, "source")] {
        writeln!(out, "{:32}  the {role}'s alone (mode 0600); never leaves it", show(&own.key))?;
        writeln!(out, "{:32}  the {role}'s, and a copy for the {other}", show(&own.cert))?;
    }
    writeln!(
        out,
        "\nTo the destination go {}, {} and {}, by a way you trust. Then:",
        file(&destination.key),
        file(&destination.cert),
        file(&source.cert)
    )?;
    for (command, own, peer) in
        [("receive --listen ADDR:PORT", destination, source), ("send --to HOST:PORT", source, destination)]
    {
        let (cert, key, peer) = (file(&own.cert), file(&own.key), file(&peer.cert));
        writeln!(out, "  belay {command} --cert {cert} --key {key} --peer-cert {peer}")?;
    }
    writeln!(out, "Once it is on the destination, remove {} here.", file(&destination.key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn args(out: &Path) -> KeygenArgs {
        KeygenArgs { out: out.join("keys"), source: "a".into(), destination: "b".into() }
    }

    #[test]
    fn keygen_makes_two_pairs_that_trust_each_other_and_says_where_each_half_goes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (source, destination) = make(&args(dir.path())).expect("keys");
        for pair in [&source, &destination] {
            let mode = pair.key.metadata().expect("key").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{:?}", pair.key);
        }
        for (own, peer) in [(&source, &destination), (&destination, &source)] {
            belay_transport::session::Credentials::load(&own.cert, &own.key, &peer.cert).expect("usable");
        }
        let mut text = vec![];
        tell(&mut text, &source, &destination).expect("told");
        let text = String::from_utf8(text).expect("utf-8");
        assert!(text.contains("belay send --to HOST:PORT --cert a.crt --key a.key --peer-cert b.crt"), "{text}");
        assert!(text.contains("To the destination go b.key, b.crt and a.crt"), "{text}");
    }

    #[test]
    fn keygen_replaces_nothing_and_leaves_no_half_behind() {
        let dir = tempfile::tempdir().expect("tempdir");
        let args = args(dir.path());
        std::fs::create_dir(&args.out).expect("dir");
        std::fs::write(args.out.join("b.crt"), "mine").expect("write");
        assert!(matches!(make(&args), Err(KeygenError::Exists(path)) if path.ends_with("b.crt")));
        let left: Vec<_> =
            std::fs::read_dir(&args.out).expect("dir").map(|entry| entry.expect("entry").file_name()).collect();
        assert_eq!(left, ["b.crt"]);
    }

    #[test]
    fn a_name_that_is_no_file_name_is_refused() {
        for bad in ["", "../x", "a/b", ".hidden", "-flag", "a b"] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
        assert!(name("node-7.rack_2").is_ok());
    }
}

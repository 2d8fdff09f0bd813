//! For tests: golden files, the bytes of every message of every version of a protocol, as they were when the version came out.
//!
//! They lie in `<crate>/tests/golden/v<N>/<room>/<message>`. With `BELAY_GOLDEN=write` the folder of a version that has none is
//! written; one that is there is never written again, because the other host may speak it. (While a version is not out yet, remove
//! its folder by hand.)

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Compares `messages`, as they are encoded today for version `version`, with the files of `room` in `folder`
/// (`<crate>/tests/golden`), and gives the files to be read again.
pub fn compare(folder: &str, version: u16, room: &str, messages: &[(&str, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(folder).join(format!("v{version}")).join(room);
    if std::env::var("BELAY_GOLDEN").as_deref() == Ok("write") && !folder.exists() {
        fs::create_dir_all(&folder).expect("a folder");
        messages.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).expect("write"));
    }
    let there: BTreeMap<String, Vec<u8>> = fs::read_dir(&folder)
        .unwrap_or_else(|error| {
            panic!("{}: {error}; BELAY_GOLDEN=write writes a new version's files", folder.display())
        })
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().into_string().expect("ASCII"), fs::read(entry.path()).expect("read")))
        .collect();
    let today: BTreeMap<String, Vec<u8>> =
        messages.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
    assert_eq!(today.len(), messages.len(), "two messages have one name");
    let names = |all: &BTreeMap<String, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&today), names(&there), "{}: a message more or less is another version", folder.display());
    for (name, bytes) in &today {
        let was = &there[name];
        let at = bytes.iter().zip(was).position(|(is, was)| is != was).unwrap_or(bytes.len().min(was.len()));
        assert!(
            bytes == was,
            "{}/{name} is {} bytes today and was {}, different from byte {at} on: raise the version",
            folder.display(),
            bytes.len(),
            was.len()
        );
    }
    there.into_iter().collect()
}

//! A second QEMU over the guest's memory, started beside the first one before the guest leaves, into which a catch loads it: a QEMU whose guest
//! has left cannot be loaded into.
//!
//! Its command line is the running one's, but for what cannot be opened twice. Consoles and logs get a name of their own (`.standby` at the
//! end, then `.standby2` and so on: a standby that has a guest leaves it to the next one); what listens for operators is left out, since this QEMU has a monitor of its own; whatever else would take something away from the
//! running guest is refused by its name, and an operator gives the arguments himself.

use std::path::PathBuf;

/// Why no command line could be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StandbyError {
    #[error("{option} {value}: {why}")]
    CannotBeTwice { option: String, value: String, why: &'static str },
    #[error("its command line is empty")]
    Empty,
}

/// Where a backend's memory is to be found, if not by the path on the command line.
pub type Elsewhere = Vec<(String, PathBuf)>;

const SUFFIX: &str = ".standby";

/// What the console or log at `path` is called where the next QEMU opens it. It grows by a digit and not by a word, because a guest may be
/// caught any number of times and a name is bounded.
fn another(path: &str) -> String {
    let counted = path.rsplit_once(SUFFIX).and_then(|(start, count)| match count {
        "" => Some((start, 2)),
        count => Some((start, count.parse::<u64>().ok()?.checked_add(1)?)),
    });
    counted.map_or_else(|| format!("{path}{SUFFIX}"), |(start, count)| format!("{start}{SUFFIX}{count}"))
}

/// The standby's arguments, without program, monitor and `-incoming`, from those of the QEMU that runs.
pub fn arguments(running: &[String], elsewhere: &Elsewhere) -> Result<Vec<String>, StandbyError> {
    let (_, running) = running.split_first().ok_or(StandbyError::Empty)?;
    let mut made = Vec::new();
    let mut words = running.iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix('-').map(|rest| rest.strip_prefix('-').unwrap_or(rest)) else {
            made.push(word.clone());
            continue;
        };
        let mut value = || words.next().cloned().unwrap_or_default();
        let refused = |value: String, why| StandbyError::CannotBeTwice { option: word.clone(), value, why };
        match option {
            // Of whoever operates the running one; and what this one gets anyhow.
            "qmp" | "qmp-pretty" | "monitor" | "mon" | "pidfile" | "incoming" | "vnc" | "spice" | "display" | "gdb"
            | "loadvm" => drop(value()),
            // Touching all of guest memory is for whoever has it first.
            "S" | "s" | "daemonize" | "mem-prealloc" => {}
            "nographic" => made.extend(["-serial".to_owned(), "null".to_owned()]),
            "serial" | "parallel" | "debugcon" => {
                let value = value();
                let other = character(&value).map_err(|why| refused(value, why))?;
                made.extend([word.clone(), other]);
            }
            "chardev" => {
                let value = value();
                let other = chardev(&value).map_err(|why| refused(value, why))?;
                made.extend([word.clone(), other]);
            }
            "object" => {
                let value = value();
                let other = object(&value, elsewhere).map_err(|why| refused(value, why))?;
                made.extend([word.clone(), other]);
            }
            "netdev" | "nic" => {
                let value = value();
                let named = fields(&value).iter().any(|field| field.starts_with("ifname="));
                if value.starts_with("tap,") && named {
                    return Err(refused(value, "a tap is open in one QEMU at a time; make the standby another one"));
                }
                made.extend([word.clone(), value]);
            }
            "D" => made.extend([word.clone(), another(&value())]),
            "add-fd" | "readconfig" | "preconfig" => {
                let value = if option == "preconfig" { String::new() } else { value() };
                return Err(refused(value, "it came from whoever started QEMU, and is not on its command line"));
            }
            _ => made.push(word.clone()),
        }
    }
    let handed_down = |word: &&String| word.contains("/dev/fdset/") || fields(word).iter().any(|field| is_fd(field));
    if let Some(word) = made.iter().find(handed_down) {
        let why = "a descriptor that was handed down to QEMU";
        return Err(StandbyError::CannotBeTwice { option: "the argument".to_owned(), value: word.clone(), why });
    }
    made.extend(["-display".to_owned(), "none".to_owned()]);
    Ok(made)
}

fn is_fd(field: &str) -> bool {
    ["fd=", "fds=", "vhostfd=", "vhostfds="].iter().any(|name| field.starts_with(name))
}

/// The fields of a value; a doubled comma is one that belongs to its field.
fn fields(value: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut letters = value.chars().peekable();
    while let Some(letter) = letters.next() {
        let last = found.last_mut().expect("never empty");
        match letter {
            ',' if letters.peek() == Some(&',') => {
                letters.next();
                last.push(',');
            }
            ',' => found.push(String::new()),
            other => last.push(other),
        }
    }
    found
}

fn joined(fields: &[String]) -> String {
    fields.iter().map(|field| field.replace(',', ",,")).collect::<Vec<_>>().join(",")
}

fn listens(fields: &[String]) -> bool {
    fields.iter().any(|field| matches!(field.as_str(), "server" | "server=on" | "server=yes" | "server=true"))
}

const CONNECTS: &str = "its other end would find itself connected to two QEMUs";

/// The back end of `-serial`.
fn character(value: &str) -> Result<String, &'static str> {
    let value = value.strip_prefix("mon:").unwrap_or(value);
    let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
    match kind {
        "stdio" => Ok("null".to_owned()),
        "none" | "null" | "vc" | "pty" | "ringbuf" | "chardev" => Ok(value.to_owned()),
        "file" => {
            let mut fields = fields(rest);
            fields[0] = another(&fields[0]);
            Ok(format!("file:{}", joined(&fields)))
        }
        "unix" => {
            let mut fields = fields(rest);
            if !listens(&fields) {
                return Err(CONNECTS);
            }
            fields[0] = another(&fields[0]);
            Ok(format!("unix:{}", joined(&fields)))
        }
        "tcp" | "telnet" | "websocket" | "udp" => Err("its port is taken"),
        _ => Err("it cannot be opened twice"),
    }
}

/// The value of `-chardev`.
fn chardev(value: &str) -> Result<String, &'static str> {
    if value.starts_with('{') {
        return Err("it is written as JSON, which is not looked into");
    }
    let mut fields = fields(value);
    let id = fields.iter().find(|field| field.starts_with("id=")).cloned().unwrap_or_default();
    let path = fields.iter_mut().find(|field| field.starts_with("path="));
    match (value.split(',').next().unwrap_or_default(), path) {
        ("stdio", _) => Ok(format!("null,{id}")),
        ("null" | "vc" | "pty" | "ringbuf", _) => Ok(value.to_owned()),
        ("file", Some(path)) => {
            *path = format!("path={}", another(path.trim_start_matches("path=")));
            Ok(joined(&fields))
        }
        ("socket", Some(path)) => {
            *path = format!("path={}", another(path.trim_start_matches("path=")));
            if listens(&fields) { Ok(joined(&fields)) } else { Err(CONNECTS) }
        }
        ("socket", None) => Err("its port is taken"),
        _ => Err("it cannot be opened twice"),
    }
}

/// The value of `-object`. Memory is left as it is: neither filled at the start nor thrown away at the end.
fn object(value: &str, elsewhere: &Elsewhere) -> Result<String, &'static str> {
    let instead =
        |id: &str| elsewhere.iter().find(|(there, _)| there == id).map(|(_, path)| path.display().to_string());
    if value.starts_with('{') {
        let mut object: serde_json::Value = serde_json::from_str(value).map_err(|_| "it is no JSON")?;
        let Some(fields) = object.as_object_mut() else { return Err("it is no object") };
        let text = |fields: &serde_json::Map<_, serde_json::Value>, name: &str| {
            fields.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned()
        };
        if text(fields, "qom-type").starts_with("memory-backend-") {
            for name in ["prealloc", "discard-data"] {
                fields.remove(name);
            }
            if let Some(path) = instead(&text(fields, "id")) {
                fields.insert("mem-path".to_owned(), path.into());
            }
        }
        return Ok(object.to_string());
    }
    if !value.starts_with("memory-backend-") {
        return Ok(value.to_owned());
    }
    let mut fields = fields(value);
    fields.retain(|field| !field.starts_with("prealloc=") && !field.starts_with("discard-data="));
    let id = fields.iter().find_map(|field| field.strip_prefix("id=")).unwrap_or_default().to_owned();
    if let (Some(path), Some(field)) = (instead(&id), fields.iter_mut().find(|field| field.starts_with("mem-path="))) {
        *field = format!("mem-path={path}");
    }
    Ok(joined(&fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn made(line: &str) -> Result<String, String> {
        let elsewhere = vec![("gone".to_owned(), PathBuf::from("/proc/7/fd/9"))];
        let made = arguments(&words(&format!("qemu {line}")), &elsewhere);
        made.map(|words| words.join(" ").replace(" -display none", "")).map_err(|error| error.to_string())
    }

    #[test]
    fn what_makes_the_machine_stays_and_what_listens_for_operators_goes() {
        let machine =
            "-machine q35,memory-backend=m -m 1G -smp 2 -device virtio-rng-pci -kernel k -append a -no-reboot";
        assert_eq!(made(machine).unwrap(), machine);
        let line = format!(
            "-S -daemonize -pidfile p --qmp unix:/q,server=on,wait=off -monitor stdio -mon chardev=c -vnc :1 -display gtk -incoming defer {machine} -mem-prealloc"
        );
        assert_eq!(made(&line).unwrap(), machine);
        assert_eq!(arguments(&[], &vec![]), Err(StandbyError::Empty));
        assert_eq!(arguments(&words("qemu"), &vec![]).unwrap(), ["-display", "none"]);
    }

    #[test]
    fn consoles_and_logs_get_names_of_their_own() {
        assert_eq!(
            made("-serial file:/a -serial unix:/b,,c,server=on,wait=off").unwrap(),
            "-serial file:/a.standby -serial unix:/b,,c.standby,server=on,wait=off"
        );
        assert_eq!(made("-serial mon:stdio -serial chardev:c").unwrap(), "-serial null -serial chardev:c");
        assert_eq!(made("-nographic").unwrap(), "-serial null");
        assert_eq!(
            made("-chardev socket,id=c,path=/c,server=on,wait=off").unwrap(),
            "-chardev socket,id=c,path=/c.standby,server=on,wait=off"
        );
        assert_eq!(made("-chardev stdio,id=c,mux=on -D log").unwrap(), "-chardev null,id=c -D log.standby");
    }

    #[test]
    fn a_standbys_own_standby_has_names_that_do_not_grow() {
        let mut line = "-serial file:/a -chardev socket,id=c,path=/c,server=on -D log".to_owned();
        for count in ["", "2", "3"] {
            line = made(&line).unwrap();
            assert_eq!(
                line,
                format!(
                    "-serial file:/a.standby{count} -chardev socket,id=c,path=/c.standby{count},server=on -D log.standby{count}"
                )
            );
        }
        assert_eq!(another("/x.standby/log"), "/x.standby/log.standby");
        assert_eq!(another("/x.standby9"), "/x.standby10");
        assert_eq!(another(&format!("x.standby{}", u64::MAX)), format!("x.standby{}.standby", u64::MAX));
    }

    #[test]
    fn what_would_be_taken_from_the_running_guest_is_refused_by_its_name() {
        for (line, why) in [
            ("-serial tcp::4444,server=on", "-serial tcp::4444,server=on: its port is taken"),
            ("-serial unix:/x", "connected to two QEMUs"),
            ("-chardev socket,id=c,path=/x", "connected to two QEMUs"),
            ("-chardev socket,id=c,host=h,port=1", "its port is taken"),
            ("-chardev pipe,id=c,path=/x", "cannot be opened twice"),
            ("-add-fd set=1,fd=3", "whoever started QEMU"),
            ("-netdev tap,id=n,fd=3", "handed down"),
            ("-netdev tap,id=n,ifname=vm1,script=no", "make the standby another one"),
            ("-blockdev file,filename=/dev/fdset/2", "handed down"),
        ] {
            let error = made(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn memory_is_neither_filled_nor_thrown_away_by_it() {
        assert_eq!(
            made("-object memory-backend-file,id=m,size=1G,mem-path=/m,share=on,prealloc=on,discard-data=on").unwrap(),
            "-object memory-backend-file,id=m,size=1G,mem-path=/m,share=on"
        );
        assert_eq!(
            made("-object memory-backend-file,id=gone,mem-path=/h").unwrap(),
            "-object memory-backend-file,id=gone,mem-path=/proc/7/fd/9"
        );
        let json = r#"-object {"qom-type":"memory-backend-file","id":"gone","mem-path":"/h","prealloc":true}"#;
        assert_eq!(
            made(json).unwrap(),
            r#"-object {"id":"gone","mem-path":"/proc/7/fd/9","qom-type":"memory-backend-file"}"#
        );
        assert_eq!(made("-object rng-random,id=r").unwrap(), "-object rng-random,id=r");
    }

    #[test]
    fn no_line_makes_this_panic() {
        proptest::proptest!(|(words in proptest::collection::vec("(-serial|-chardev|-object|[a-z:,={}\"/]{0,12})", 0..6))| {
            let _ = arguments(&words, &vec![]);
        });
    }
}

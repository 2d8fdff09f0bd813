//! Names of functions: the kernel's from /proc/kallsyms, this program's and its libraries' from their symbol tables.

use std::io;

/// Longest function of the C library's that is taken for a copy from its address alone.
const COPY_FUNCTION_BYTES: u64 = 2048;

/// A function, and what it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    pub name: String,
    /// `kernel`, a module of it, or the file that was mapped.
    pub of: String,
}

/// The kernel's functions.
pub struct Kernel {
    text: String,
    /// Address, and where the name and the module stand in `text`.
    sorted: Vec<(u64, usize)>,
}

impl Kernel {
    /// Fails where the kernel shows no addresses (kptr_restrict, or no privilege).
    pub fn read() -> io::Result<Self> {
        let text = std::fs::read_to_string("/proc/kallsyms")?;
        let mut sorted = Vec::new();
        let mut at = 0;
        for line in text.split_inclusive('\n') {
            let mut fields = line.split_ascii_whitespace();
            let address = fields.next().and_then(|field| u64::from_str_radix(field, 16).ok());
            if let (Some(address), Some("t" | "T" | "w" | "W")) = (address, fields.next()) {
                sorted.push((address, at));
            }
            at += line.len();
        }
        sorted.sort_unstable();
        if sorted.last().is_none_or(|(address, _)| *address == 0) {
            let why = "/proc/kallsyms shows no addresses: kptr_restrict, or no CAP_SYSLOG";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(Self { text, sorted })
    }

    /// The function at `address`, and its module.
    pub fn name(&self, address: u64) -> Option<(&str, &str)> {
        let after = self.sorted.partition_point(|(start, _)| *start <= address);
        let (_, at) = self.sorted.get(after.checked_sub(1)?)?;
        let mut fields = self.text[*at..].lines().next()?.split_ascii_whitespace().skip(2);
        let name = fields.next()?;
        Some((name, fields.next().map_or("kernel", |module| module.trim_matches(['[', ']']))))
    }
}

/// Functions of this process.
pub struct Program {
    /// Addresses of the copies that the C library chose for this processor, which its symbol table does not name.
    copies: [(u64, &'static str); 2],
    /// Mapped ranges, and files.
    maps: Vec<(u64, u64, String)>,
}

impl Program {
    pub fn read() -> io::Result<Self> {
        let line = |line: &str| {
            let mut fields = line.split_ascii_whitespace();
            let (from, to) = fields.next()?.split_once('-')?;
            let file = fields.nth(4).unwrap_or("[anonymous]");
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some((hex(from)?, hex(to)?, file.rsplit('/').next().unwrap_or(file).to_owned()))
        };
        let maps = std::fs::read_to_string("/proc/self/maps")?.lines().filter_map(line).collect();
        let (memcpy, memmove) = (libc::memcpy as *const () as u64, libc::memmove as *const () as u64);
        Ok(Self { copies: [(memcpy, "memcpy"), (memmove, "memmove")], maps })
    }

    pub fn name(&self, address: u64) -> Name {
        let of = self.maps.iter().find(|(from, to, _)| (*from..*to).contains(&address));
        let of = of.map_or_else(|| "?".to_owned(), |(_, _, file)| file.clone());
        let mut name = None;
        // Several where functions were inlined: the innermost comes first.
        backtrace::resolve(address as usize as *mut std::ffi::c_void, |symbol| {
            if name.is_none() {
                name = symbol.name().map(|name| format!("{name:#}"));
            }
        });
        let copy = self.copies.iter().find(|(at, _)| (*at..*at + COPY_FUNCTION_BYTES).contains(&address));
        let name = match (name, copy) {
            (_, Some((_, copy))) => (*copy).to_owned(),
            (Some(name), None) => name,
            (None, None) => format!("{address:#x}"),
        };
        Name { name, of }
    }
}

/// Whether a function of that name does nothing but copy memory.
pub fn copies(name: &str) -> bool {
    const ANYWHERE: [&str; 5] = ["memcpy", "memmove", "mempcpy", "copy_nonoverlapping", "rep_movs"];
    const FIRST: [&str; 12] = [
        "copy_user",
        "copy_to_",
        "copy_from_",
        "copyin",
        "copyout",
        "copy_page",
        "copy_folio",
        "copy_mc",
        "raw_copy_",
        "csum_partial_copy",
        "skb_copy",
        "memcpy_",
    ];
    let bare = name.trim_start_matches('_');
    ANYWHERE.iter().any(|part| name.contains(part)) || FIRST.iter().any(|start| bare.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_known_by_their_names_and_nothing_else_is() {
        for name in
            ["memcpy", "__memmove_avx_unaligned_erms", "copy_user_enhanced_fast_string", "_copy_to_iter", "copyout"]
        {
            assert!(copies(name), "{name}");
        }
        for name in [
            "copy_process",
            "do_copyfile",
            "shmem_fault",
            "belay_transport::pull::shard::Shard::run",
            "clear_page_erms",
        ] {
            assert!(!copies(name), "{name}");
        }
    }
}

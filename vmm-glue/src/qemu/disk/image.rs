//! A disk's image: written by one host at a time, read past the page cache by the other.

use super::lock;
use super::log::Part;
use rustix::fs::{FallocateFlags, OFlags, fallocate, fstatfs};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What reads past the page cache begin and end at, in the file and in memory.
const ALIGNMENT: usize = 4096;
/// Zeroes that are written at once where the file system cannot make them.
const ZEROES: usize = 64 << 10;
/// File systems that live in this host's memory: no other host has them, and there is nothing to read past (statfs(2)).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Why an image could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot {doing} {}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("somebody else writes {}", .path.display())]
    InUse { path: PathBuf },
    #[error("{} has {bytes} bytes; a disk has a multiple of 512, and some", .path.display())]
    Size { path: PathBuf, bytes: u64 },
    #[error("{} has {now} bytes, and had {before}", .path.display())]
    Changed { path: PathBuf, before: u64, now: u64 },
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Image {
    fn with(path: &Path, options: &OpenOptions, doing: &'static str) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Io { doing, path: path.to_owned(), source };
        let mut file = options.open(path).map_err(failed)?;
        // Of a block device too, whose length stat(2) does not tell.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if bytes == 0 || bytes % 512 != 0 {
            return Err(ImageError::Size { path: path.to_owned(), bytes });
        }
        Ok(Self { file, path: path.to_owned(), bytes })
    }

    /// Opens it to read what is on the storage now, whoever writes it.
    pub fn reader(path: &Path) -> Result<Self, ImageError> {
        let mut options = OpenOptions::new();
        options.read(true);
        let direct = Self::with(path, options.clone().custom_flags(OFlags::DIRECT.bits() as i32), "open for reading");
        match direct {
            Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => {
                let plain = Self::with(path, &options, "open for reading")?;
                let system = fstatfs(&plain.file).map_err(|errno| plain.failed("look at", errno.into()))?;
                match IN_MEMORY.contains(&(system.f_type as i64)) {
                    true => Ok(plain),
                    // Its page cache could show what the image was.
                    false => {
                        Err(plain.failed("read past the page cache (O_DIRECT) in", io::ErrorKind::Unsupported.into()))
                    }
                }
            }
            done => done,
        }
    }

    /// Opens it to write, if nobody else does. Nobody else can until it is dropped.
    pub fn writer(path: &Path) -> Result<Self, ImageError> {
        let image = Self::with(path, OpenOptions::new().read(true).write(true), "open for writing")?;
        match lock::take_for_writing(&image.file) {
            Ok(true) => Ok(image),
            Ok(false) => Err(ImageError::InUse { path: path.to_owned() }),
            Err(source) => Err(image.failed("lock", source)),
        }
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> ImageError {
        ImageError::Io { doing, path: self.path.clone(), source }
    }

    /// Its length, as it was when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `into` from `offset` on. Through memory that is aligned as the storage wants it.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let first = offset / ALIGNMENT as u64 * ALIGNMENT as u64;
        let skip = (offset - first) as usize;
        let len = (skip + into.len()).next_multiple_of(ALIGNMENT);
        let mut memory = vec![0_u8; len + ALIGNMENT];
        let lead = memory.as_ptr().align_offset(ALIGNMENT);
        let aligned = &mut memory[lead..lead + len];
        let mut have = 0;
        while have < skip + into.len() {
            // Only at the end of the image does less come than was asked for, and that is not aligned any more.
            match self.file.read_at(&mut aligned[have..], first + have as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(came) => have += came,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        into.copy_from_slice(&aligned[skip..skip + into.len()]);
        Ok(())
    }

    /// Writes; see [`Image::sync`].
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes bytes read as zero, their room kept.
    pub fn zero(&self, offset: u64, len: u32) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, flags, offset, u64::from(len)).is_ok() {
            return Ok(());
        }
        let (mut at, end) = (offset, offset + u64::from(len));
        while at < end {
            let now = (end - at).min(ZEROES as u64);
            self.file.write_all_at(&[0; ZEROES][..now as usize], at)?;
            at += now;
        }
        Ok(())
    }

    /// Returns once everything written before is on the storage.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Does what a guest did, in its order, and returns once it is on the storage. Flushes are flushes here too, so that a host that dies
    /// in the middle leaves what the guest's own disk could have been.
    pub fn apply<'p>(&self, parts: impl IntoIterator<Item = Part<'p>>) -> io::Result<()> {
        let mut unsynced = true;
        for part in parts {
            match part {
                Part::Write { offset, data } => self.write(offset, data)?,
                Part::Zero { offset, len } => self.zero(offset, len)?,
                Part::Flush => self.sync()?,
            }
            unsynced = part != Part::Flush;
        }
        if unsynced { self.sync() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writes_an_image_and_a_second_is_refused_until_the_first_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [7; 5 * 512]).unwrap();
        let first = Image::writer(&path).unwrap();
        assert!(matches!(Image::writer(&path), Err(ImageError::InUse { .. })));
        let reader = Image::reader(&path).unwrap();
        first.write(1000, b"written").unwrap();
        first.sync().unwrap();
        let mut bytes = [0; 9];
        reader.read(999, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\x07written\x07");
        // The image's end is no multiple of what storage is read in.
        reader.read(5 * 512 - 9, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 9]);
        assert!(reader.read(5 * 512 - 8, &mut bytes).is_err());
        drop(first);
        Image::writer(&path).unwrap();
    }

    #[test]
    fn what_is_no_image_is_refused_with_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        assert!(matches!(Image::writer(&path), Err(ImageError::Io { .. })));
        for bytes in [0, 511] {
            std::fs::write(&path, vec![0; bytes]).unwrap();
            assert!(
                matches!(Image::reader(&path), Err(ImageError::Size { bytes: found, .. }) if found == bytes as u64)
            );
        }
    }

    #[test]
    fn applying_a_log_twice_or_half_and_then_all_leaves_the_same_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [7; 4096]).unwrap();
        let image = Image::writer(&path).unwrap();
        let parts = [
            Part::Write { offset: 10, data: b"abc" },
            Part::Flush,
            Part::Zero { offset: 11, len: 600 },
            Part::Write { offset: 12, data: b"z" },
        ];
        let mut wanted = vec![7; 4096];
        wanted[10] = b'a';
        wanted[11..611].fill(0);
        wanted[12] = b'z';
        for part in 0..=parts.len() {
            image.apply(parts[..part].iter().copied()).unwrap();
            image.apply(parts).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), wanted);
        }
    }
}

//! Device state of a QEMU guest as it goes between hosts, and how a checkpoint's becomes something that a QEMU can load.
//!
//! ```text
//! at the switch    a migration's stream without RAM:   QEVM, version · configuration · RAM blocks: names, ROMs, … · devices · end
//! in a checkpoint  xen-save-devices-state:             QEVM, version ·                                              devices · end
//! at a catch       the first one's prefix, the second one's devices                                                 └─────┬─────┘
//! ```
//! QEMU has no command that loads the second into a fresh machine (xen-load-devices-state ends it). What stands before the devices does not
//! change after the switch: the machine's name, the blocks' names and sizes, and the contents of blocks that no guest writes. Both come
//! from one machine in one process, whose devices are written in one order, so the first device's header is where the prefix ends: its
//! section number, name, instance and version (qemu docs/devel/migration/main.rst).
//!
//! On the wire: `BQS` and a version, then which of the two, then the number that the guest's next frame will have (8 bytes, little-endian; its
//! network relay counts, and QEMU does not), then QEMU's own bytes.

use belay_checkpoint::guest::GuestError;

const HEAD: [u8; 4] = *b"BQS\x01";
const STREAM: u8 = 1;
const DEVICES: u8 = 2;
/// "QEVM" and the version of streams that every QEMU of today writes.
const QEVM: [u8; 8] = *b"QEVM\0\0\0\x03";
const SECTION_FULL: u8 = 4;
const SECTION_FOOTER: u8 = 0x7e;
/// Footer mark and section number.
const FOOTER_BYTES: usize = 5;

/// What a state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State<'a> {
    /// A whole migration stream without RAM: loads as it is.
    Stream(&'a [u8]),
    /// vCPUs and devices: loads behind a prefix.
    Devices(&'a [u8]),
}

fn bad(why: impl Into<String>) -> GuestError {
    GuestError::BadState(why.into())
}

/// Appends what stands before a stream.
pub fn begin_stream(out: &mut Vec<u8>, next_output: u64) {
    begin(out, STREAM, next_output);
}

/// Appends what stands before devices.
pub fn begin_devices(out: &mut Vec<u8>, next_output: u64) {
    begin(out, DEVICES, next_output);
}

fn begin(out: &mut Vec<u8>, kind: u8, next_output: u64) {
    out.extend_from_slice(&HEAD);
    out.push(kind);
    out.extend_from_slice(&next_output.to_le_bytes());
}

impl<'a> State<'a> {
    /// Reads one, and the number of the guest's next frame.
    pub fn read(bytes: &'a [u8]) -> Result<(Self, u64), GuestError> {
        let rest = bytes.strip_prefix(&HEAD).ok_or_else(|| bad("it is not of a QEMU guest, or of another version"))?;
        let short = || bad("it ends before it says what it is");
        let (kind, rest) = rest.split_first().ok_or_else(short)?;
        let (next_output, body) = rest.split_first_chunk().ok_or_else(short)?;
        let next_output = u64::from_le_bytes(*next_output);
        if !body.starts_with(&QEVM) {
            return Err(bad("it is no stream of QEMU's, of version 3"));
        }
        match *kind {
            STREAM => Ok((Self::Stream(body), next_output)),
            DEVICES => Ok((Self::Devices(body), next_output)),
            other => Err(bad(format!("it is of kind {other}"))),
        }
    }
}

/// The header of the first device in what xen-save-devices-state wrote.
pub fn first_header(devices: &[u8]) -> Result<&[u8], GuestError> {
    let short = || bad(format!("{} bytes of device state hold no device", devices.len()));
    let body = devices.strip_prefix(&QEVM).ok_or_else(short)?;
    // Mark, section number, length of the name; name; instance, version.
    let name = usize::from(*body.get(5).ok_or_else(short)?);
    let header = body.get(..6 + name + 8).ok_or_else(short)?;
    if header[0] != SECTION_FULL || name == 0 {
        return Err(bad(format!("its first section is of kind {}, with a name of {name} bytes", header[0])));
    }
    Ok(header)
}

/// Where the devices begin in a stream whose first device has this header: once, right behind the footer of what comes before.
pub fn prefix_bytes(stream: &[u8], header: &[u8]) -> Result<usize, GuestError> {
    let begins = |at: usize| stream[at - FOOTER_BYTES] == SECTION_FOOTER && stream[at..].starts_with(header);
    let last = stream.len().saturating_sub(header.len());
    let mut found = (FOOTER_BYTES..=last.max(FOOTER_BYTES)).filter(|&at| at <= last && begins(at));
    match (found.next(), found.next()) {
        (Some(at), None) => Ok(at),
        (None, _) => Err(bad("its migration stream does not have the device that its device state begins with")),
        (Some(one), Some(two)) => Err(bad(format!("its devices could begin at byte {one} or at byte {two}"))),
    }
}

/// What follows a prefix.
pub fn behind_the_prefix(devices: &[u8]) -> &[u8] {
    devices.get(QEVM.len()..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section as QEMU writes it, without what is in it.
    fn section(number: u32, name: &str) -> Vec<u8> {
        let mut bytes = vec![SECTION_FULL];
        bytes.extend(number.to_be_bytes());
        bytes.push(name.len() as u8);
        bytes.extend(name.bytes());
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 2]);
        bytes
    }

    fn streams(memory: &[u8]) -> (Vec<u8>, Vec<u8>, usize) {
        let footer = [SECTION_FOOTER, 0, 0, 0, 2];
        let timer = [section(0, "timer"), vec![9; 24]].concat();
        let prefix = [&QEVM[..], b"\x07pc-q35", memory, &footer].concat();
        let at = prefix.len();
        ([prefix, timer.clone(), vec![0]].concat(), [&QEVM[..], &timer, &[0]].concat(), at)
    }

    #[test]
    fn devices_of_a_checkpoint_follow_the_prefix_of_the_switch() {
        let (stream, mut devices, at) = streams(&[0xab; 5000]);
        // Later the clocks have moved on.
        let len = devices.len();
        devices[len - 5] ^= 0xff;
        let found = prefix_bytes(&stream, first_header(&devices).unwrap()).unwrap();
        assert_eq!(found, at);
        let whole = [&stream[..found], behind_the_prefix(&devices)].concat();
        assert_eq!((whole.len(), &whole[..at]), (stream.len(), &stream[..at]));
        assert_eq!(&whole[at..], &devices[8..]);
    }

    #[test]
    fn a_prefix_that_is_not_certain_is_refused() {
        let (stream, devices, at) = streams(&[0; 40]);
        let header = first_header(&devices).unwrap();
        // The name alone, in memory of the guest's, is not where devices begin.
        let (named, ..) = streams(&[b"timer".as_slice(), header].concat());
        assert_eq!(prefix_bytes(&named, header).unwrap(), at - 40 + 5 + header.len());
        let forged = [&[SECTION_FOOTER, 0, 0, 0, 1], header].concat();
        let (two, ..) = streams(&forged);
        assert!(prefix_bytes(&two, header).unwrap_err().to_string().contains("could begin"));
        for len in 0..stream.len() {
            let _ = prefix_bytes(&stream[..len], header);
        }
        assert!(prefix_bytes(&stream[..at], header).is_err());
        assert!(prefix_bytes(&[], header).is_err());
    }

    #[test]
    fn a_state_says_which_it_is_and_what_is_none_is_refused() {
        let (stream, devices, _) = streams(&[]);
        let mut bytes = Vec::new();
        begin_stream(&mut bytes, 0x0102);
        bytes.extend(&stream);
        assert_eq!(State::read(&bytes).unwrap(), (State::Stream(&stream), 0x0102));
        assert_eq!(bytes[..13], *b"BQS\x01\x01\x02\x01\0\0\0\0\0\0", "as it is on the wire");
        let mut bytes = Vec::new();
        begin_devices(&mut bytes, 7);
        bytes.extend(&devices);
        assert_eq!(State::read(&bytes).unwrap(), (State::Devices(&devices), 7));
        assert_eq!(bytes[4], 2, "as it is in a record");
        bytes[4] = 3;
        assert!(State::read(&bytes).is_err());
        assert!(
            State::read(&stream).is_err()
                && State::read(b"BQS\x01").is_err()
                && State::read(b"BQS\x01\x01QEVM").is_err()
        );
    }

    #[test]
    fn no_bytes_make_reading_a_state_panic() {
        proptest::proptest!(|(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80))| {
            let _ = State::read(&bytes);
            let with_head = [&QEVM[..], &bytes].concat();
            if let Ok(header) = first_header(&with_head) {
                let _ = prefix_bytes(&bytes, header);
            }
        });
    }
}

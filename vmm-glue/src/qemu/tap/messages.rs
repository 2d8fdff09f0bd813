//! What is said to the kernel's network over rtnetlink, and what of its answers is read. Only bytes; the kernel's own order of them.

use std::fmt::Write as _;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Has the answer to a question about a queue come to who asked.
const NLM_F_ECHO: u16 = 8;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

pub(super) const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = 1;
const ARPHRD_ETHER: u16 = 1;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS: u16 = 3;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;
/// What comes in of a device; also the parent of that queue itself.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_0000;
const TC_H_ROOT: u32 = 0xffff_ffff;
const PLUG: u32 = 0x0001_0000;
/// Priority 1, every protocol (ETH_P_ALL in network order).
const FIRST_OF_ALL: u32 = 1 << 16 | 0x0300;

/// What a plug is told (linux/pkt_sched.h, TCQ_PLUG_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// What comes from here on is of the next epoch.
    Buffer = 0,
    /// What came before the last [`Order::Buffer`] may leave.
    ReleaseOne = 1,
    /// Everything may leave, also what comes.
    ReleaseForGood = 2,
}

/// A device, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    /// Carries Ethernet frames.
    pub ethernet: bool,
    /// tun, ifb …; empty for a device of no kind.
    pub kind: String,
}

/// What a queue has let out and what it holds, both in bytes as it counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Queue {
    pub left: u64,
    pub held: u32,
    /// Frames.
    pub dropped: u32,
}

/// Bytes that are not what the kernel says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's answer {what}: {bytes}")]
pub struct AnswerError {
    what: &'static str,
    /// The first of them, hexadecimal.
    bytes: String,
}

fn wrong(what: &'static str, bytes: &[u8]) -> AnswerError {
    let mut text = String::new();
    for byte in bytes.iter().take(48) {
        let _ = write!(text, "{byte:02x}");
    }
    AnswerError { what, bytes: text }
}

/// A message that is being made.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        // Sequence and port are the socket's.
        bytes.extend([0; 8]);
        Self(bytes)
    }

    fn link(kind: u16, flags: u16, index: u32, device_flags: u32) -> Self {
        let mut message = Self::new(kind, flags);
        message.0.extend([0; 4]);
        // Whatever is said of flags is said of those that change.
        for word in [index, device_flags, device_flags] {
            message.0.extend(word.to_ne_bytes());
        }
        message
    }

    fn queue(kind: u16, flags: u16, index: u32, (handle, parent, info): (u32, u32, u32)) -> Self {
        let mut message = Self::new(kind, flags);
        message.0.extend([0; 4]);
        for word in [index, handle, parent, info] {
            message.0.extend(word.to_ne_bytes());
        }
        message
    }

    fn attribute(&mut self, kind: u16, content: impl FnOnce(&mut Self)) {
        let at = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        content(self);
        let length = (self.0.len() - at) as u16;
        self.0[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn with(mut self, kind: u16, content: impl FnOnce(&mut Self)) -> Self {
        self.attribute(kind, content);
        self
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |message| {
            message.0.extend(text.as_bytes());
            message.0.push(0);
        });
    }

    fn words(&mut self, words: &[u32]) {
        self.0.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }

    fn done(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// Numbers a message, so that its answers are known.
pub(super) fn number(message: &mut [u8], sequence: u32) {
    message[8..12].copy_from_slice(&sequence.to_ne_bytes());
}

/// What is there by this name?
pub(super) fn get_link(name: &str) -> Vec<u8> {
    let mut message = Message::link(RTM_GETLINK, 0, 0, 0);
    message.text(IFLA_IFNAME, name);
    message.done()
}

/// An intermediate functional block of this name.
pub(super) fn new_ifb(name: &str) -> Vec<u8> {
    let mut message = Message::link(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, 0);
    message.text(IFLA_IFNAME, name);
    message.with(IFLA_LINKINFO, |info| info.text(IFLA_INFO_KIND, "ifb")).done()
}

pub(super) fn set_up(index: u32) -> Vec<u8> {
    Message::link(RTM_NEWLINK, 0, index, IFF_UP).done()
}

pub(super) fn delete_link(index: u32) -> Vec<u8> {
    Message::link(RTM_DELLINK, 0, index, 0).done()
}

fn plug(kind: u16, flags: u16, index: u32) -> Message {
    Message::queue(kind, flags, index, (PLUG, TC_H_ROOT, 0))
}

/// A plug that is shut, in place of the device's own queue; it holds this many bytes and drops what comes then.
pub(super) fn new_plug(index: u32, most_bytes: u32) -> Vec<u8> {
    let mut message = plug(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, index);
    message.text(TCA_KIND, "plug");
    message.with(TCA_OPTIONS, |options| options.words(&[Order::Buffer as u32, most_bytes])).done()
}

pub(super) fn order(index: u32, order: Order) -> Vec<u8> {
    let mut message = plug(RTM_NEWQDISC, 0, index);
    message.text(TCA_KIND, "plug");
    message.with(TCA_OPTIONS, |options| options.words(&[order as u32, 0])).done()
}

/// What has the device's plug let out, and what does it hold?
pub(super) fn get_plug(index: u32) -> Vec<u8> {
    plug(RTM_GETQDISC, NLM_F_ECHO, index).done()
}

/// A place for filters on what comes in of the device.
pub(super) fn new_ingress(index: u32) -> Vec<u8> {
    let mut message = Message::queue(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, index, (INGRESS, TC_H_INGRESS, 0));
    message.text(TCA_KIND, "ingress");
    message.done()
}

pub(super) fn delete_ingress(index: u32) -> Vec<u8> {
    Message::queue(RTM_DELQDISC, 0, index, (INGRESS, TC_H_INGRESS, 0)).done()
}

/// All that comes in of `index` goes out by `to` instead, where an ifb gives it back to `index`.
pub(super) fn redirect(index: u32, to: u32) -> Vec<u8> {
    let mut message = Message::queue(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, index, (0, INGRESS, FIRST_OF_ALL));
    message.text(TCA_KIND, "matchall");
    let mirred = |parms: &mut Message| parms.words(&[0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]);
    let action = |action: &mut Message| {
        action.text(TCA_ACT_KIND, "mirred");
        action.attribute(TCA_ACT_OPTIONS, |options| options.attribute(TCA_MIRRED_PARMS, mirred));
    };
    message
        .with(TCA_OPTIONS, |options| {
            options.attribute(TCA_MATCHALL_ACT, |actions| actions.attribute(1, action));
        })
        .done()
}

/// One message of a datagram: its type, its number and what is behind its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heard<'a> {
    pub kind: u16,
    pub sequence: u32,
    pub body: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// The messages of a datagram.
pub(super) fn messages(datagram: &[u8]) -> Result<Vec<Heard<'_>>, AnswerError> {
    let mut rest = datagram;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let one = || -> Option<(usize, Heard<'_>)> {
            let length = word(rest, 0)? as usize;
            let body = rest.get(16..length)?;
            Some((length, Heard { kind: half(rest, 4)?, sequence: word(rest, 8)?, body }))
        };
        let (length, heard) = one().ok_or_else(|| wrong("ends in the middle of a message", rest))?;
        found.push(heard);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// The error number of an acknowledgement; 0 where it was done.
pub(super) fn errno(body: &[u8]) -> Result<i32, AnswerError> {
    let code = word(body, 0).ok_or_else(|| wrong("has no error number", body))?;
    Ok((code as i32).saturating_neg())
}

/// Attributes: the last of each kind wins, as in the kernel.
fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let (mut rest, mut found) = (bytes, None);
    while let (Some(length), Some(kind)) = (half(rest, 0), half(rest, 2)) {
        let length = usize::from(length);
        let Some(content) = rest.get(4..length) else { break };
        // The two highest bits say how it is made.
        if kind & 0x3fff == wanted {
            found = Some(content);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

pub(super) fn read_link(heard: &Heard<'_>) -> Result<Link, AnswerError> {
    let read = || {
        let attributes = heard.body.get(16..)?;
        let kind = attribute(attributes, IFLA_LINKINFO).and_then(|info| attribute(info, IFLA_INFO_KIND));
        let kind = String::from_utf8_lossy(kind.unwrap_or_default()).trim_end_matches('\0').to_owned();
        Some(Link { index: word(heard.body, 4)?, ethernet: half(heard.body, 2)? == ARPHRD_ETHER, kind })
    };
    read().filter(|_| heard.kind == RTM_NEWLINK).ok_or_else(|| wrong("is of no device", heard.body))
}

pub(super) fn read_queue(heard: &Heard<'_>) -> Result<Queue, AnswerError> {
    let read = || {
        let stats = attribute(heard.body.get(20..)?, TCA_STATS)?;
        let left = u64::from_ne_bytes(stats.get(..8)?.try_into().ok()?);
        Some(Queue { left, dropped: word(stats, 12)?, held: word(stats, 32)? })
    };
    read().filter(|_| heard.kind == RTM_NEWQDISC).ok_or_else(|| wrong("is of no queue", heard.body))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes
            .chunks(4)
            .map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn each_message_is_the_bytes_that_the_kernel_reads() {
        const HEADER: &str = "00000000 00000000";
        let golden = [
            (
                new_ifb("belay-7"),
                format!(
                    "38000000 10000506 {HEADER} 00000000 00000000 00000000 00000000 0c000300 62656c61 792d3700 0c001200 08000100 69666200"
                ),
            ),
            (
                get_link("vm1"),
                format!("28000000 12000500 {HEADER} 00000000 00000000 00000000 00000000 08000300 766d3100"),
            ),
            (set_up(9), format!("20000000 10000500 {HEADER} 00000000 09000000 01000000 01000000")),
            (delete_link(9), format!("20000000 11000500 {HEADER} 00000000 09000000 00000000 00000000")),
            (
                new_plug(9, 1 << 25),
                format!(
                    "3c000000 24000506 {HEADER} 00000000 09000000 00000100 ffffffff 00000000 09000100 706c7567 00000000 0c000200 00000000 00000002"
                ),
            ),
            (
                order(9, Order::ReleaseOne),
                format!(
                    "3c000000 24000500 {HEADER} 00000000 09000000 00000100 ffffffff 00000000 09000100 706c7567 00000000 0c000200 01000000 00000000"
                ),
            ),
            (get_plug(9), format!("24000000 26000d00 {HEADER} 00000000 09000000 00000100 ffffffff 00000000")),
            (
                new_ingress(7),
                format!(
                    "30000000 24000506 {HEADER} 00000000 07000000 0000ffff f1ffffff 00000000 0c000100 696e6772 65737300"
                ),
            ),
            (delete_ingress(7), format!("24000000 25000500 {HEADER} 00000000 07000000 0000ffff f1ffffff 00000000")),
            (
                redirect(7, 9),
                format!(
                    "70000000 2c000506 {HEADER} 00000000 07000000 00000000 0000ffff 00030100 0d000100 6d617463 68616c6c 00000000 3c000200 38000200 34000100 0b000100 6d697272 65640000 24000200 20000200 00000000 00000000 04000000 00000000 00000000 01000000 09000000"
                ),
            ),
        ];
        for (message, wanted) in golden {
            assert_eq!(hex(&message), wanted);
        }
    }

    #[test]
    fn what_a_queue_holds_is_read_from_where_the_kernel_puts_it() {
        let mut stats = vec![0; 40];
        stats[..8].copy_from_slice(&0x1_0000_0002_u64.to_ne_bytes());
        stats[12..16].copy_from_slice(&3_u32.to_ne_bytes());
        stats[32..36].copy_from_slice(&4096_u32.to_ne_bytes());
        let mut message = plug(RTM_NEWQDISC, 0, 9);
        message.text(TCA_KIND, "plug");
        let bytes = message.with(TCA_STATS, |content| content.0.extend(stats)).done();
        let heard = messages(&bytes).unwrap();
        assert_eq!(read_queue(&heard[0]), Ok(Queue { left: 0x1_0000_0002, held: 4096, dropped: 3 }));
        assert!(read_link(&heard[0]).is_err());
        let device = new_ifb("belay-7");
        let heard = messages(&device).unwrap();
        assert_eq!(read_link(&heard[0]), Ok(Link { index: 0, ethernet: false, kind: "ifb".to_owned() }));
        assert!(read_queue(&heard[0]).is_err());
        assert_eq!(errno(&(-17_i32).to_ne_bytes()), Ok(17));
    }

    #[test]
    fn no_answer_makes_this_panic() {
        proptest::proptest!(|(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), length in 0_u32..220)| {
            let mut bytes = bytes;
            if let Some(first) = bytes.get_mut(..4) {
                first.copy_from_slice(&length.to_ne_bytes());
            }
            for heard in messages(&bytes).unwrap_or_default() {
                let _ = (read_link(&heard), read_queue(&heard), errno(heard.body));
            }
        });
    }
}

//! Both sides of a tcp lane under any bytes, each held against a model of the protocol that is as plain as can be.

use super::lane::TcpLane;
use super::owner::Server;
use super::wire::{Operation, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::fabric::exports::Exports;
use crate::fabric::{Lane, LaneId, LaneKind, LocalKey, Read, ReadKey, RefusedReason, Write, WriteKey};
use crate::fuzzing::{answers, heard, say};
use crate::region::{Extent, Mapping, RamFile};
use crate::session::LaneStream;
use crate::units::PageSize;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

const PAGE: usize = 4096;
/// Guest RAM at the owner: the page in the middle was not exported.
const RAM: usize = 3 * PAGE;
const RING: usize = 2 * PAGE;
/// The keys: RAM at place 0, ring at 1, the owner's region at 2.
const KEYS: u64 = 0x6b65_7973_0000;
const ID: LaneId = LaneId { kind: LaneKind::Bulk, index: 0 };
/// Longest input: so many reads' answers fit into a socket that nobody reads from.
const MOST_BYTES: usize = 1024;

thread_local! {
    static MEMORY: [Arc<Mapping>; 4] = [RAM, RING, PAGE, RAM].map(|len| {
        Arc::new(RamFile::memfd("belay-fuzzing", len, PageSize::Small).and_then(|file| Ok(file.map().expect("mmap"))).expect("memory"))
    });
}

pub(crate) fn lanes(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    let bytes = &bytes[..bytes.len().min(MOST_BYTES)];
    match mode % 3 {
        0 => wire(bytes),
        1 => owner(bytes),
        _ => initiator(bytes),
    }
}

fn wire(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<REQUEST_BYTES>()
        && let Some(request) = Request::decode(bytes)
    {
        assert_eq!(request.encode(), *bytes);
    }
    if let Some(bytes) = bytes.first_chunk::<RESPONSE_BYTES>()
        && let Some(response) = Response::decode(bytes)
    {
        assert_eq!(response.encode(), *bytes);
    }
}

fn ram_byte(at: usize) -> u8 {
    (at * 7 + at / 256) as u8
}

fn bytes_of(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.len()];
    mapping.read(0, &mut bytes);
    bytes
}

/// What an owner must do with `bytes`: what its ring holds then, what it answers, and whether it need not send all of that
/// because what came next was no request.
fn model(mut bytes: &[u8]) -> (Vec<u8>, Vec<u8>, bool) {
    let (mut ring, mut said, mut sequence) = (vec![0; RING], Vec::new(), 0);
    while let Some((head, rest)) = bytes.split_first_chunk::<REQUEST_BYTES>() {
        let Some(request) = Request::decode(head).filter(|request| request.sequence == sequence) else {
            return (ring, said, true);
        };
        bytes = rest;
        let len = request.len as usize;
        let inside = |size: u64| request.offset.checked_add(request.len.into()).is_some_and(|end| end <= size);
        let verdict = match (request.key.wrapping_sub(KEYS), request.operation) {
            (0 | 2, Operation::Write) | (1, Operation::Read) => Err(RefusedReason::NoRight),
            (3.., _) => Err(RefusedReason::UnknownKey),
            _ if request.len == 0 || request.len > crate::fabric::MAX_OPERATION_BYTES => Err(RefusedReason::BadLength),
            (0, _) if inside(PAGE as u64) || request.offset >= 2 * PAGE as u64 && inside(RAM as u64) => Ok(()),
            (1, _) if inside(RING as u64) => Ok(()),
            (2, _) if inside(PAGE as u64) => Ok(()),
            _ => Err(RefusedReason::OutOfRange),
        };
        let at = request.offset as usize;
        match (verdict, request.operation) {
            (Err(reason), _) => {
                said.extend(Response { result: Err(reason), sequence }.encode());
                break;
            }
            (Ok(()), Operation::Read) => {
                said.extend(Response { result: Ok(request.len), sequence }.encode());
                let of_ram = request.key == KEYS;
                said.extend((at..at + len).map(|at| if of_ram { ram_byte(at) } else { 0 }));
            }
            (Ok(()), Operation::Write) => {
                let here = len.min(bytes.len());
                ring[at..at + here].copy_from_slice(&bytes[..here]);
                bytes = &bytes[here..];
                if here < len {
                    break;
                }
                said.extend(Response { result: Ok(0), sequence }.encode());
            }
        }
        sequence += 1;
    }
    (ring, said, false)
}

/// Whatever an initiator asks, the owner does what the model does: nothing beyond the exports is read, nothing but the ring written.
fn owner(bytes: &[u8]) {
    let memory = MEMORY.with(Clone::clone);
    let [ram, ring, region, _] = &memory;
    ram.write(0, &(0..RAM).map(ram_byte).collect::<Vec<_>>());
    ring.zero(0, RING);
    region.zero(0, PAGE);
    let mut exports = Exports::default();
    let populated = [Extent { offset: 0, len: PAGE as u64 }, Extent { offset: 2 * PAGE as u64, len: PAGE as u64 }];
    exports.add_read(ram, &populated).expect("within the mapping");
    exports.add_ring(ring, region).expect("one ring");
    let (end, peer) = heard(bytes);
    let exports = Arc::new(exports.with_keys(KEYS));
    // It ends at the end of what it heard.
    let _ = Server::new(ID, LaneStream::for_test(end), exports, Arc::default()).run();
    let (wanted_ring, wanted, cut_off) = model(bytes);
    assert!(bytes_of(ring) == wanted_ring, "the ring is not as the model has it");
    assert!(bytes_of(ram).into_iter().enumerate().all(|(at, byte)| byte == ram_byte(at)), "guest RAM was changed");
    assert!(bytes_of(region) == [0; PAGE], "the owner's region was changed");
    let said = answers(&peer);
    // When all that was asked for is more than the socket holds, the rest is lost with the lane.
    let may_lack = cut_off || wanted.len() > 64 << 10;
    assert!(said == wanted || may_lack && wanted.starts_with(&said), "{} of {}", said.len(), wanted.len());
}

/// Whatever an owner answers, only the places that were asked for change, and what completes is what came.
fn initiator(bytes: &[u8]) {
    let Some((&plan, bytes)) = bytes.split_first() else { return };
    let memory = MEMORY.with(Clone::clone);
    let local = &memory[3];
    local.zero(0, RAM);
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (end, peer) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket pair");
    let locals: Arc<[Arc<Mapping>]> = vec![Arc::clone(local)].into();
    let mut lane = TcpLane::new(ID, LaneStream::for_test(end), locals, 8, Duration::from_secs(5));
    let mut posted = VecDeque::new();
    for id in 0..u64::from(plan % 8) {
        // Apart from each other, so that a byte too far shows.
        let (at, len) = (id * 1024 + 100, 1 + id as u32 * 40);
        if plan & (8 << (id % 5)) == 0 {
            let read = Read { id, remote: ReadKey(1), remote_offset: 0, local: LocalKey(0), local_offset: at, len };
            lane.post_reads(&[read]).expect("a socket's buffer is larger");
            posted.push_back((at as usize, len as usize));
        } else {
            let write = Write { id, remote: WriteKey(1), remote_offset: 0, local: LocalKey(0), local_offset: at, len };
            lane.post_writes(&[write]).expect("a socket's buffer is larger");
            posted.push_back((at as usize, 0));
        }
    }
    say(&peer, bytes);
    let mut done = [u64::MAX; 3];
    let mut completed = Vec::new();
    while let Ok(got @ 1..) = lane.poll(&mut done) {
        completed.extend_from_slice(&done[..got]);
    }
    assert!(completed.iter().copied().eq(0..completed.len() as u64), "{completed:?} is not the order of posting");
    let mut rest = bytes;
    let mut wanted = vec![0; RAM];
    for (sequence, (at, len)) in (0u64..).zip(posted) {
        let finished = sequence < completed.len() as u64;
        let whole = rest
            .split_first_chunk::<RESPONSE_BYTES>()
            .filter(|(head, _)| Response::decode(head) == Some(Response { result: Ok(len as u32), sequence }));
        match whole {
            Some((_, data)) if finished => {
                wanted[at..at + len].copy_from_slice(&data[..len]);
                rest = &data[len..];
            }
            _ => assert!(!finished, "operation {sequence} completed without an answer to it"),
        }
        if !finished {
            // Part of its bytes may have come, in its own place and nowhere else.
            local.read(at, &mut wanted[at..at + len]);
        }
    }
    assert!(bytes_of(local) == wanted, "memory was changed that nobody asked for, or to something else than what came");
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let ask = |operation, place: u64, offset, len, sequence| {
        Request { operation, len, key: KEYS + place, offset, sequence }.encode().to_vec()
    };
    let answer = |result, sequence| Response { result, sequence }.encode().to_vec();
    let asked = [
        ask(Operation::Read, 0, 0, 64, 0),
        ask(Operation::Write, 1, 8000, 100, 1),
        vec![5; 100],
        ask(Operation::Read, 2, 0, 512, 2),
        ask(Operation::Read, 0, 4096, 1, 3),
    ];
    let answered = [vec![3 | 8 << 1], answer(Ok(1), 0), vec![1], answer(Ok(0), 1), answer(Ok(81), 2), vec![3; 81]];
    vec![
        ("request", [vec![0], ask(Operation::Read, 0, 0, 4096, 0)].concat()),
        ("response", [vec![0], answer(Err(RefusedReason::NoRight), 7)].concat()),
        ("owner", [vec![1], asked.concat()].concat()),
        ("owner-torn-write", [vec![1], ask(Operation::Write, 1, 0, 4096, 0), vec![6; 30]].concat()),
        ("initiator", [vec![2], answered.concat()].concat()),
        (
            "initiator-refused",
            [vec![2, 2], answer(Ok(1), 0), vec![1], answer(Err(RefusedReason::OutOfRange), 1)].concat(),
        ),
    ]
}

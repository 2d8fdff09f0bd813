//! The bookkeeping of a lane's send queue: operations in posting order, the work requests they became, and which are complete.
//!
//! ```text
//!   operations   | completed, not handed back | all posted, in flight | part posted | not posted |
//!                0                        completed                posting                    end
//!   requests     ... done ─────────────────────────────────── next     (next − done never passes the send queue's depth)
//! ```
//! An operation becomes one work request or several (chunk borders, the longest message). Requests of one queue pair complete in
//! posting order and only some ask for a completion, so a completion stands for every request before it. What the send queue has
//! no room for waits here, bounded by the lane's window.

use super::table::{Part, RemoteTable, Span, part};
use crate::fabric::exports::Right;
use std::collections::VecDeque;

/// An operation of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub id: u64,
    /// A READ or a WRITE.
    pub right: Right,
    /// Which export ([`RemoteTable::find`]) and which local mapping.
    pub remote: usize,
    pub remote_offset: u64,
    pub local: usize,
    pub local_offset: u64,
    pub len: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    operation: Operation,
    /// Bytes that have become work requests.
    posted: u32,
    /// Number of its last work request, once it is wholly posted.
    last: u64,
}

/// A work request to be posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// Comes back as the completion's wr_id.
    pub number: u64,
    pub right: Right,
    pub remote: Part,
    pub local: Part,
    /// Ends its operation.
    pub ends: bool,
}

/// Why no request can be made of an operation that was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotCovered {
    pub offset: u64,
    pub len: u32,
}

#[derive(Debug)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    completed: usize,
    posting: usize,
    next: u64,
    done: u64,
    depth: u64,
    /// Longest message of the device's port.
    most: u32,
}

impl Queue {
    /// For a send queue of `depth` requests; `room` operations never make it allocate.
    pub(super) fn new(room: usize, depth: u32, most: u32) -> Self {
        Self {
            entries: VecDeque::with_capacity(room),
            completed: 0,
            posting: 0,
            next: 0,
            done: 0,
            depth: u64::from(depth),
            most,
        }
    }

    /// Operations not handed back.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Operations complete and not handed back.
    #[inline]
    pub(super) fn completed(&self) -> usize {
        self.completed
    }

    /// Whether there is something to post.
    #[inline]
    pub(super) fn has_unposted(&self) -> bool {
        self.posting < self.entries.len()
    }

    /// Requests that the send queue still takes.
    #[inline]
    pub(super) fn room(&self) -> u64 {
        self.depth - (self.next - self.done)
    }

    pub(super) fn push(&mut self, operation: Operation) {
        self.entries.push_back(Entry { operation, posted: 0, last: 0 });
    }

    /// The next request, if there is room in the send queue and something to post. The tables are looked at only here.
    pub(super) fn next_request(
        &mut self,
        remotes: &RemoteTable,
        locals: &[Box<[Span]>],
    ) -> Option<Result<Request, NotCovered>> {
        if self.room() == 0 {
            return None;
        }
        let entry = self.entries.get_mut(self.posting)?;
        let Operation { right, remote, remote_offset, local, local_offset, len, .. } = entry.operation;
        let (done, left) = (u64::from(entry.posted), len - entry.posted);
        let request = part(remotes.spans(remote), remote_offset + done, left, self.most).and_then(|there| {
            let here = part(&locals[local], local_offset + done, there.len, there.len)?;
            Some((Part { len: here.len, ..there }, here))
        });
        let Some((there, here)) = request else {
            return Some(Err(NotCovered { offset: remote_offset + done, len: left }));
        };
        let number = self.next;
        self.next += 1;
        entry.posted += here.len;
        let ends = entry.posted == len;
        if ends {
            entry.last = number;
            self.posting += 1;
        }
        Some(Ok(Request { number, right, remote: there, local: here, ends }))
    }

    /// A completion of request `number`, and so of all before it. `false`: no such request is in flight.
    pub(super) fn complete_through(&mut self, number: u64) -> bool {
        if number < self.done || number >= self.next {
            return false;
        }
        self.done = number + 1;
        while self.completed < self.posting && self.entries[self.completed].last < self.done {
            self.completed += 1;
        }
        true
    }

    /// The operation that request `number` belongs to, for messages.
    pub(super) fn id_of(&self, number: u64) -> Option<u64> {
        let posted = self.entries.iter().take(self.posting).skip(self.completed);
        let of = posted.clone().find(|entry| entry.last >= number).or_else(|| self.entries.get(self.posting));
        of.map(|entry| entry.operation.id)
    }

    /// Hands completed operations back, oldest first.
    pub(super) fn take(&mut self, into: &mut [u64]) -> usize {
        let count = into.len().min(self.completed);
        for (to, entry) in into.iter_mut().zip(self.entries.drain(..count)) {
            *to = entry.operation.id;
        }
        self.completed -= count;
        self.posting -= count;
        count
    }

    /// Forgets every completed operation without handing it back.
    pub(super) fn drop_completed(&mut self) {
        self.entries.drain(..self.completed);
        self.posting -= self.completed;
        self.completed = 0;
    }
}

/// For tests of what uses it: a table of one export.
#[cfg(test)]
pub(super) fn one_export(key: u64, writable: bool, spans: Vec<Span>) -> RemoteTable {
    RemoteTable::checked(vec![super::table::ExportTable { key, writable, spans }]).expect("a valid table")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spans(len: u64, chunk: u64) -> Vec<Span> {
        (0..len.div_ceil(chunk))
            .map(|at| {
                let offset = at * chunk;
                Span { offset, len: chunk.min(len - offset), address: 10_000 + 2 * offset, key: at as u32 }
            })
            .collect()
    }

    fn operation(id: u64, remote_offset: u64, local_offset: u64, len: u32) -> Operation {
        Operation { id, right: Right::Read, remote: 0, remote_offset, local: 0, local_offset, len }
    }

    #[test]
    fn an_operation_over_chunk_borders_on_both_sides_completes_as_one() {
        let table = one_export(0, false, spans(1000, 100));
        let locals = [spans(1000, 70).into_boxed_slice()];
        let mut queue = Queue::new(4, 64, u32::MAX);
        queue.push(operation(7, 90, 0, 220));
        queue.push(operation(8, 0, 0, 10));
        let requests: Vec<_> = std::iter::from_fn(|| queue.next_request(&table, &locals)).map(|r| r.unwrap()).collect();
        // Borders: there at 100, 200, 300 (that is 10, 110, 210 of it), here at 70, 140, 210.
        let lens: Vec<_> = requests.iter().map(|r| r.local.len).collect();
        assert_eq!(lens, [10, 60, 40, 30, 70, 10, 10]);
        assert!(requests.iter().all(|r| r.local.len == r.remote.len));
        assert_eq!(
            requests.iter().map(|r| r.ends).collect::<Vec<_>>(),
            [false, false, false, false, false, true, true]
        );
        assert!(queue.complete_through(4));
        assert_eq!((queue.completed(), queue.id_of(5), queue.id_of(6)), (0, Some(7), Some(8)));
        assert!(!queue.complete_through(4), "completed before");
        assert!(!queue.complete_through(7), "never posted");
        assert!(queue.complete_through(6), "one completion stands for all before it");
        let mut ids = [0; 4];
        assert_eq!(queue.take(&mut ids), 2);
        assert_eq!(ids[..2], [7, 8]);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn what_is_no_longer_covered_is_said_and_not_posted() {
        let table = one_export(0, false, spans(100, 100));
        let locals = [spans(1000, 1000).into_boxed_slice()];
        let mut queue = Queue::new(4, 64, u32::MAX);
        queue.push(operation(1, 90, 0, 20));
        assert!(queue.next_request(&table, &locals).unwrap().is_ok());
        assert_eq!(queue.next_request(&table, &locals), Some(Err(NotCovered { offset: 100, len: 10 })));
    }

    proptest! {
        /// Whatever the depth and wherever completions come, every byte is posted once, in order, never beyond the depth, and
        /// operations come back in order, each exactly when its last request has completed.
        #[test]
        fn operations_complete_in_order_and_the_send_queue_never_overflows(
            depth in 1..9_u32,
            most in 1..100_u32,
            sizes in prop::collection::vec(1..300_u32, 1..30),
            steps in prop::collection::vec((0..8_u64, 0..4_usize), 1..400),
        ) {
            let table = one_export(0, false, spans(300, 64));
            let locals = [spans(300, 48).into_boxed_slice()];
            let mut queue = Queue::new(sizes.len(), depth, most);
            for (id, len) in (0..).zip(&sizes) {
                queue.push(operation(id, 0, 0, *len));
            }
            let (mut posted, mut ends, mut returned) = (Vec::new(), Vec::new(), Vec::new());
            let mut done = 0_u64;
            for (complete, take) in steps.into_iter().chain(std::iter::repeat_n((8, 4), 4000)) {
                while let Some(request) = queue.next_request(&table, &locals) {
                    let request = request.unwrap();
                    prop_assert_eq!(request.number, posted.len() as u64);
                    posted.push(request.local.len);
                    if request.ends { ends.push(request.number); }
                }
                prop_assert!(posted.len() as u64 - done <= u64::from(depth));
                if complete > 0 && done < posted.len() as u64 {
                    done = (done + complete).min(posted.len() as u64);
                    prop_assert!(queue.complete_through(done - 1));
                }
                let due = ends.iter().filter(|end| **end < done).count();
                prop_assert_eq!(returned.len() + queue.completed(), due);
                let mut some = [0; 4];
                let got = queue.take(&mut some[..take]);
                returned.extend_from_slice(&some[..got]);
                if returned.len() == sizes.len() { break; }
            }
            prop_assert_eq!(returned, (0..sizes.len() as u64).collect::<Vec<_>>());
            let bytes: u64 = posted.iter().map(|len| u64::from(*len)).sum();
            prop_assert_eq!(bytes, sizes.iter().map(|len| u64::from(*len)).sum::<u64>());
            prop_assert_eq!(queue.len(), 0);
        }
    }
}

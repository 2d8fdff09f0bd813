//! Requests and responses of a tcp lane as they are on the wire.

use super::wire::{Operation, Request, Response};
use crate::fabric::RefusedReason::{BadLength, NoRight, OutOfRange, Revoked, UnknownKey};
use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

#[test]
fn a_tcp_lane_speaks_as_it_did_when_the_version_came_out() {
    let request = |operation| Request {
        operation,
        len: 0x0403_0201,
        key: 0x1817_1615_1413_1211,
        offset: 0x2827_2625_2423_2221,
        sequence: 0x3837_3635_3433_3231,
    };
    let response = |result| Response { result, sequence: 0x3837_3635_3433_3231 };
    let requests = [("read", request(Operation::Read)), ("write", request(Operation::Write))];
    let responses = [
        ("done", response(Ok(0x0403_0201))),
        ("unknown-key", response(Err(UnknownKey))),
        ("no-right", response(Err(NoRight))),
        ("out-of-range", response(Err(OutOfRange))),
        ("bad-length", response(Err(BadLength))),
        ("revoked", response(Err(Revoked))),
    ];
    let mut messages: Vec<_> = requests.iter().map(|(name, request)| (*name, request.encode().to_vec())).collect();
    messages.extend(responses.iter().map(|(name, response)| (*name, response.encode().to_vec())));
    let files = compare(FOLDER, 1, "tcp", &messages);
    let file = |name: &str| files.iter().find(|(there, _)| there == name).expect("compared").1.clone();
    for (name, request) in requests {
        assert_eq!(Request::decode(&file(name).try_into().unwrap()), Some(request));
    }
    for (name, response) in responses {
        assert_eq!(Response::decode(&file(name).try_into().unwrap()), Some(response));
    }
}

//! What a client says to the observer, as it is on the socket.

use super::*;

use crate::golden::compare;
use belay_checkpoint::guest::Packet;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// Everything one client says that shows two packets.
pub(crate) fn said() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("observer");
    let listener = UnixListener::bind(&path).expect("bound");
    let mut client = ObserverClient::new(ObserverAddress::Unix(path), "source-1");
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("it comes");
            let mut all = vec![0; 12 + 8];
            stream.read_exact(&mut all).expect("the hello");
            for sequence in [300u64, 301] {
                let mut packet = vec![0; 12 + 5];
                stream.read_exact(&mut packet).expect("a packet");
                stream.write_all(&sequence.to_le_bytes()).expect("acknowledged");
                all.extend(packet);
            }
            all
        });
        for sequence in [300, 301] {
            client.send(&Packet { sequence, bytes: vec![0xaa; 5] }).expect("taken");
        }
        heard.join().expect("heard")
    })
}

#[test]
fn a_client_of_the_observer_speaks_as_when_the_version_came_out() {
    for (_, bytes) in compare(FOLDER, VERSION, "observer", &[("client", said())]) {
        fuzzing::served(&bytes);
        assert_eq!(bytes.len(), 20 + 2 * 17);
    }
}

//! Listening to the other host: a thread that turns control frames, and the end of them, into messages of a channel.

use super::protocol;
use belay_transport::session::{Control, SessionError};
use belay_transport::{Deadline, explain};
use crossbeam_channel::{Receiver, bounded};
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What came from the peer.
#[derive(Debug)]
pub enum Listened<M> {
    Message(M),
    /// The stream ended or broke, and how. Nothing comes after it. A failure, whatever came before (P6).
    Closed(String),
}

/// Messages not yet taken; more are left in the socket, so that a peer that talks too much waits.
const INBOX_MESSAGES: usize = 64;

/// A running listener; ends when dropped or when the stream does.
pub struct Inbox<M> {
    messages: Receiver<Listened<M>>,
    stop: Arc<AtomicBool>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

/// Starts to listen on `control`.
pub fn listen_to<M: DeserializeOwned + Send + 'static>(control: Arc<Control>) -> std::io::Result<Inbox<M>> {
    let (sender, messages) = bounded(INBOX_MESSAGES);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, stream) = (Arc::clone(&stop), Arc::clone(&control));
    let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let (heard, last) = match stream.recv(Deadline::after(Duration::from_millis(200))) {
                Ok(frame) => match protocol::decode(&frame) {
                    Ok(message) => (Listened::Message(message), false),
                    Err(error) => (Listened::Closed(explain(&error)), true),
                },
                Err(SessionError::TimedOut { .. }) => continue,
                Err(error) => (Listened::Closed(explain(&error)), true),
            };
            if sender.send(heard).is_err() || last {
                return;
            }
        }
    })?;
    Ok(Inbox { messages, stop, control, thread: Some(thread) })
}

impl<M> Inbox<M> {
    /// Where messages arrive.
    pub fn messages(&self) -> &Receiver<Listened<M>> {
        &self.messages
    }
}

impl<M> Drop for Inbox<M> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.control.shutdown();
        // Room for a thread that is handing over a last message.
        while self.messages.try_recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

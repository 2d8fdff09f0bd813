//! One question at a time to the kernel's network, each with a deadline.

use super::messages::{self, AnswerError, Link, NLMSG_ERROR, Order, Queue};
use belay_transport::Deadline;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// For an answer. The kernel gives it before `send` returns, unless others change its network meanwhile.
const BOUND: Duration = Duration::from_secs(2);
/// Longest datagram: an answer about one device is below 4 KiB.
const MOST_BYTES: usize = 32 << 10;

/// Why the kernel's network is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("cannot {doing}: {errno}{}", meaning(*.errno, .needs))]
    Refused {
        doing: String,
        errno: Errno,
        /// The module that this is in.
        needs: &'static str,
    },
    #[error("cannot {doing}: the kernel gave no answer")]
    NoAnswer { doing: String },
    #[error("cannot {doing}")]
    Answer {
        doing: String,
        #[source]
        source: AnswerError,
    },
    #[error("cannot open a netlink socket: {0}")]
    Socket(Errno),
}

impl NetlinkError {
    /// Whether what was asked about is not there.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Refused { errno: Errno::NODEV | Errno::NOENT | Errno::INVAL, .. })
    }
}

/// What an error number says of the network, where it says more than its name.
fn meaning(errno: Errno, needs: &str) -> String {
    match errno {
        Errno::PERM | Errno::ACCESS => " (belay needs CAP_NET_ADMIN)".to_owned(),
        Errno::NOENT | Errno::OPNOTSUPP if !needs.is_empty() => {
            format!(" (has this kernel no {needs}? modprobe {needs})")
        }
        _ => String::new(),
    }
}

/// A socket of rtnetlink.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None);
        Ok(Self { socket: socket.map_err(NetlinkError::Socket)?, sequence: 0 })
    }

    /// Says `message`, and gives what `read` makes of the answer before the acknowledgement.
    fn ask<T>(
        &mut self,
        doing: impl FnOnce() -> String,
        needs: &'static str,
        mut message: Vec<u8>,
        read: impl Fn(&messages::Heard<'_>) -> Result<T, AnswerError>,
    ) -> Result<Option<T>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        messages::number(&mut message, self.sequence);
        match self.exchange(&message, read) {
            Ok(answer) => Ok(answer),
            Err(Failed::Errno(Errno::AGAIN)) => Err(NetlinkError::NoAnswer { doing: doing() }),
            Err(Failed::Errno(errno)) => Err(NetlinkError::Refused { doing: doing(), errno, needs }),
            Err(Failed::Answer(source)) => Err(NetlinkError::Answer { doing: doing(), source }),
        }
    }

    fn exchange<T>(
        &mut self,
        message: &[u8],
        read: impl Fn(&messages::Heard<'_>) -> Result<T, AnswerError>,
    ) -> Result<Option<T>, Failed> {
        let deadline = Deadline::after(BOUND);
        send(&self.socket, message, SendFlags::empty())?;
        let mut buffer = vec![0; MOST_BYTES];
        let mut answer = None;
        loop {
            let left = deadline.left();
            if left.is_zero() {
                return Err(Errno::AGAIN.into());
            }
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left))?;
            let length = match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for heard in messages::messages(&buffer[..length])? {
                if heard.sequence != self.sequence {
                    // Of a question that was given up.
                    continue;
                }
                if heard.kind != NLMSG_ERROR {
                    answer = Some(read(&heard)?);
                    continue;
                }
                return match messages::errno(heard.body)? {
                    0 => Ok(answer),
                    errno => Err(Errno::from_raw_os_error(errno).into()),
                };
            }
        }
    }

    fn tell(
        &mut self,
        doing: impl FnOnce() -> String,
        needs: &'static str,
        message: Vec<u8>,
    ) -> Result<(), NetlinkError> {
        self.ask(doing, needs, message, |_| Ok(())).map(|_| ())
    }

    /// The device of this name; `None` if there is none.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let asked =
            self.ask(|| format!("look for the device {name}"), "", messages::get_link(name), messages::read_link);
        match asked {
            Err(error) if error.is_absent() => Ok(None),
            asked => asked,
        }
    }

    pub fn make_ifb(&mut self, name: &str) -> Result<(), NetlinkError> {
        self.tell(|| format!("make the ifb device {name}"), "ifb", messages::new_ifb(name))
    }

    pub fn set_up(&mut self, name: &str, index: u32) -> Result<(), NetlinkError> {
        self.tell(|| format!("set {name} up"), "", messages::set_up(index))
    }

    /// Takes a device away, with what it holds. That it is not there is as good.
    pub fn delete_link(&mut self, name: &str, index: u32) -> Result<(), NetlinkError> {
        absent_is_done(self.tell(|| format!("delete {name}"), "", messages::delete_link(index)))
    }

    pub fn make_plug(&mut self, name: &str, index: u32, most_bytes: u32) -> Result<(), NetlinkError> {
        self.tell(|| format!("put a plug before {name}"), "sch_plug", messages::new_plug(index, most_bytes))
    }

    pub fn order(&mut self, name: &str, index: u32, order: Order) -> Result<(), NetlinkError> {
        self.tell(|| format!("tell the plug before {name} {order:?}"), "", messages::order(index, order))
    }

    pub fn queue(&mut self, name: &str, index: u32) -> Result<Queue, NetlinkError> {
        let doing = || format!("look at the plug before {name}");
        let asked = self.ask(doing, "", messages::get_plug(index), messages::read_queue)?;
        asked.ok_or_else(|| NetlinkError::NoAnswer { doing: doing() })
    }

    pub fn make_ingress(&mut self, name: &str, index: u32) -> Result<(), NetlinkError> {
        self.tell(|| format!("filter what comes in of {name}"), "sch_ingress", messages::new_ingress(index))
    }

    /// Takes away all filters of what comes in. That there are none is as good.
    pub fn delete_ingress(&mut self, name: &str, index: u32) -> Result<(), NetlinkError> {
        let doing = || format!("stop filtering what comes in of {name}");
        absent_is_done(self.tell(doing, "", messages::delete_ingress(index)))
    }

    pub fn redirect(&mut self, name: &str, index: u32, to: u32) -> Result<(), NetlinkError> {
        let doing = || format!("redirect what comes in of {name}");
        self.tell(doing, "cls_matchall or act_mirred", messages::redirect(index, to))
    }
}

fn absent_is_done(done: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    done.or_else(|error| if error.is_absent() { Ok(()) } else { Err(error) })
}

enum Failed {
    Errno(Errno),
    Answer(AnswerError),
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<AnswerError> for Failed {
    fn from(error: AnswerError) -> Self {
        Self::Answer(error)
    }
}

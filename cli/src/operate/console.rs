//! The operator's side of a running `send` or `receive`: its socket, its metrics, its board.

use super::place::{Name, Place, PlaceError};
use super::protocol::{self, FrameError, LONGEST_REQUEST, LONGEST_WAIT_MS, Request, Said, Wanted};
use super::serve::{Dialect, Door, Heard, Looked, Server, Stream};
use crate::exit::Exit;
use crate::{metrics, report};
use belay_transport::explain;
use belay_vmm_glue::migrate::observation::{Kind, Observer};
use belay_vmm_glue::migrate::operator::{Answer, Order, WAITING_ORDERS, Words};
use belay_vmm_glue::migrate::status::Board;
use clap::Args;
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How this process can be seen and operated while it runs.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Operating")]
pub struct ConsoleOptions {
    /// What `belay list`, `status` and the orders call this process [default: its role and process id]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Where its socket lies [default: /run/belay, or a directory of the user's without root]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Serve Prometheus metrics over HTTP: PORT (loopback only), or ADDRESS:PORT
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<metrics::MetricsAddress>,
    /// Structured logs on stderr, in place of sentences: error, warn, info, debug, trace, or belay=debug,… by target
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// How they look [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<crate::logs::LogFormat>,
}

impl ConsoleOptions {
    /// Fills what the command line left open from the file.
    pub fn or(self, file: Self) -> Self {
        Self {
            name: self.name.or(file.name),
            run_dir: self.run_dir.or(file.run_dir),
            metrics: self.metrics.or(file.metrics),
            log: self.log.or(file.log),
            log_format: self.log_format.or(file.log_format),
        }
    }

    /// An empty board under the name that was given, or one of its own.
    pub fn board(&self, role: &'static str) -> Arc<Board> {
        let id = self.name.clone().unwrap_or_else(|| format!("{role}-{}", std::process::id()));
        Arc::new(Board::new(id, role))
    }
}

/// How long a role may take to say what it makes of an order.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

/// Everything the operator has in a running process. The servers end with it.
pub struct Console {
    pub words: Words,
    /// Without a socket there is nobody who orders; that is not to look like somebody who has gone.
    _orders: Sender<Order>,
    _name: Option<Name>,
    _servers: Vec<Server>,
}

impl Console {
    /// Opens the socket and the metrics. What was asked for and cannot be is an error; a socket that nobody asked for is only told of.
    pub fn open(
        options: &ConsoleOptions,
        board: &Arc<Board>,
        signals: Receiver<i32>,
        observer: &Observer,
    ) -> Result<Self, Exit> {
        let (give, orders) = bounded(WAITING_ORDERS);
        let mut servers = Vec::new();
        let refused = |error: &dyn std::error::Error, advice: &str, exit| {
            report::failed(observer, error, advice);
            Err(exit)
        };
        let name = match socket(options, board, give.clone()) {
            Ok((name, server)) => {
                observer.note(
                    None,
                    Kind::Operable { name: board.id().to_owned(), socket: name.path().display().to_string() },
                );
                servers.push(server);
                Some(name)
            }
            Err(error @ (PlaceError::Name(_) | PlaceError::Taken { .. } | PlaceError::TooLong { .. })) => {
                return refused(&error, "Choose another --name; `belay list` says which are there.", Exit::Usage);
            }
            Err(error) if options.run_dir.is_some() || options.name.is_some() => {
                return refused(&error, "Choose another --run-dir.", Exit::Failed);
            }
            Err(error) => {
                let why = explain(&error);
                let why =
                    format!("`belay status` will not find this process: {why}; --run-dir chooses another directory");
                observer.note(None, Kind::State { state: "no-socket".to_owned(), why });
                None
            }
        };
        if let Some(address) = options.metrics {
            match metrics::serve(address, Arc::clone(board)) {
                Ok((server, address)) => {
                    observer.note(None, Kind::Metrics { address: address.to_string() });
                    servers.push(server);
                }
                Err(error) => {
                    return refused(
                        &error,
                        "Choose another address for --metrics; port 0 takes a free one.",
                        Exit::Failed,
                    );
                }
            }
        }
        Ok(Self {
            words: Words { signals, orders, board: Arc::clone(board) },
            _orders: give,
            _name: name,
            _servers: servers,
        })
    }
}

fn socket(options: &ConsoleOptions, board: &Arc<Board>, orders: Sender<Order>) -> Result<(Name, Server), PlaceError> {
    let place = Place::make(&options.run_dir.clone().unwrap_or_else(crate::holder::default_run_dir))?;
    let (listener, name) = place.bind(board.id())?.split();
    let dialect = Operators { board: Arc::clone(board), orders };
    let path = name.path().to_owned();
    let server = Server::start("operator", Door::Unix(listener), dialect);
    let server = server.map_err(|source| PlaceError::Io { doing: "serve", path, source })?;
    Ok((name, server))
}

/// The protocol of [`super::protocol`].
struct Operators {
    board: Arc<Board>,
    orders: Sender<Order>,
}

/// An order on its way.
struct Ordered {
    answers: Receiver<Answer>,
    accepted: bool,
    /// When whoever asked is told that it is not in time.
    until: Instant,
    wait: Duration,
}

fn late(waiting_for: &str) -> Vec<u8> {
    protocol::answer(Said::NotInTime { waiting_for: waiting_for.to_owned() })
}

impl Operators {
    fn request(&mut self, body: &[u8]) -> Result<Heard<Ordered>, FrameError> {
        Ok(match protocol::parse::<Request>(body)?.ask {
            Wanted::Status => Heard::Say(protocol::answer(Said::Status(Box::new(self.board.status())))),
            Wanted::Order { order: ask, wait_ms } => {
                let (order, answers) = Order::new(ask);
                match self.orders.try_send(order) {
                    Ok(()) => {
                        tracing::info!(order = %ask, "an order came in");
                        let wait = Duration::from_millis(wait_ms.min(LONGEST_WAIT_MS));
                        let until = Instant::now() + ANSWER_BOUND;
                        Heard::Wait(Ordered { answers, accepted: false, until, wait })
                    }
                    Err(TrySendError::Full(_)) => Heard::Say(late("orders given before it")),
                    Err(TrySendError::Disconnected(_)) => {
                        let why = "the migration is over".to_owned();
                        Heard::Say(protocol::answer(Said::Order(Answer::Refused { why })))
                    }
                }
            }
        })
    }
}

impl Dialect for Operators {
    type Waiting = Ordered;
    const LONGEST: usize = LONGEST_REQUEST + 4;

    fn admit(&mut self, client: &Stream) -> Result<(), String> {
        let Stream::Unix(client) = client else { return Err("no Unix socket".to_owned()) };
        let peer = rustix::net::sockopt::socket_peercred(client).map_err(|error| error.to_string())?;
        let own = rustix::process::geteuid();
        match peer.uid == own || peer.uid.is_root() {
            true => Ok(()),
            false => Err(format!("user {} is neither root nor {}", peer.uid.as_raw(), own.as_raw())),
        }
    }

    fn hear(&mut self, received: &[u8]) -> Heard<Ordered> {
        let heard = match protocol::body(received, LONGEST_REQUEST) {
            Ok(None) => return Heard::More,
            Ok(Some(body)) => self.request(body),
            Err(error) => Err(error),
        };
        heard.unwrap_or_else(|error| Heard::Say(protocol::answer(Said::Bad { why: error.to_string() })))
    }

    fn too_long(&mut self) -> Vec<u8> {
        protocol::answer(Said::Bad { why: format!("more than {LONGEST_REQUEST} bytes") })
    }

    fn busy(&mut self) -> Vec<u8> {
        late("others that wait for their orders")
    }

    fn look(&mut self, ordered: &mut Ordered) -> Looked {
        match ordered.answers.try_recv() {
            Ok(answer) => {
                let last = answer.is_last() || ordered.wait.is_zero();
                ordered.accepted = true;
                ordered.until = Instant::now() + ordered.wait;
                let said = protocol::answer(Said::Order(answer));
                if last { Looked::SayAndHangUp(said) } else { Looked::Say(said) }
            }
            // The role has ended without a word about it.
            Err(TryRecvError::Disconnected) => {
                let why = "the migration ended meanwhile; its status says how".to_owned();
                Looked::SayAndHangUp(protocol::answer(Said::Order(Answer::Failed { why })))
            }
            Err(TryRecvError::Empty) if Instant::now() < ordered.until => Looked::NotYet,
            Err(TryRecvError::Empty) => Looked::SayAndHangUp(late(match ordered.accepted {
                true => "the order, which stands, to come to pass",
                false => "the role, which is in the middle of a step, to look at the order, which stands",
            })),
        }
    }
}

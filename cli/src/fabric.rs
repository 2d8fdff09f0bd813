//! The fabric on the command line: what was asked for made a session's configuration, and every way it fails told with what to do.

use crate::exit::Exit;
use crate::options::FabricOptions;
use crate::report;
use belay_transport::fabric::verbs::inventory::{Inventory, Trouble};
use belay_transport::fabric::{FabricError, FabricKind};
use belay_transport::session::{Address, NoVerbs, Security, SessionConfig, SessionError};
use belay_vmm_glue::migrate::observation::Observer;

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("RDMA cannot be used on this host: {0}")]
    Rdma(#[from] Trouble),
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Refused {
    /// What the operator can do.
    fn advice(&self) -> String {
        match self {
            Self::Rdma(trouble) => {
                let mend = trouble.mend();
                let commands = if mend.is_empty() { String::new() } else { format!("Try: {}. ", mend.join(", or: ")) };
                format!("{commands}`belay check` lists what this host has; --fabric tcp needs no RDMA.")
            }
            Self::Session(error) => no_session(error).unwrap_or("Nothing was started.").to_owned(),
        }
    }

    fn exit(&self) -> Exit {
        match self {
            Self::Rdma(_) => Exit::Missing,
            Self::Session(_) => Exit::Usage,
        }
    }

    /// Tells it, and gives the exit code.
    pub fn told(&self, observer: &Observer) -> Exit {
        report::failed(observer, self, &self.advice());
        self.exit()
    }
}

/// The configuration of a session with `address`: the fabrics that were asked for and that this host has. A device that was
/// named and does not fit is an error even where `tcp` would do: it may be misspelt.
pub fn session(options: &FabricOptions, security: Security, address: &Address) -> Result<SessionConfig, Refused> {
    let settings = options.verbs();
    let only = options.only();
    let mut config = SessionConfig { only, verbs: Some(settings.clone()), ..SessionConfig::new(security) };
    config.check(address)?;
    if matches!(address, Address::Unix(_)) || only.is_some_and(|only| only != FabricKind::Verbs) {
        config.verbs = None;
        return Ok(config);
    }
    let named = settings.device.is_some() || settings.port.is_some() || settings.gid_index.is_some();
    let inventory = Inventory::of_this_host();
    if let Err(trouble) = inventory.choose(&settings, 0) {
        if named || only.is_some() {
            return Err(trouble.into());
        }
        config.verbs = None;
        config.no_verbs = Some(match inventory.devices.is_empty() {
            true => NoVerbs::NoDevice,
            false => NoVerbs::Unusable { why: trouble.to_string() },
        });
    }
    Ok(config)
}

/// What to do where a session failed over its fabric or a certificate's dates; `None` where it failed over something else.
pub fn no_session(error: &SessionError) -> Option<&'static str> {
    Some(match error {
        SessionError::NoCommonFabric { .. } => {
            "The guest was not touched. Say the same --fabric on both hosts, or leave it out to have the best that both can."
        }
        SessionError::FabricOverAddress { .. } => "Write the address that goes with the fabric, or leave --fabric out.",
        SessionError::NotLoopback { .. } => "No guest was touched. `belay keygen` makes certificates for both hosts.",
        SessionError::NoVerbs { why: NoVerbs::NotTrusted } => {
            "Say --trusted-fabric on both hosts if nobody else is on that network; or use --fabric tcp, which encrypts."
        }
        SessionError::NoVerbs { why: NoVerbs::NoKey } => {
            "Give both hosts certificates (`belay keygen`) instead of --insecure, or use --fabric tcp."
        }
        SessionError::NotValidNow { .. } => {
            "The guest was not touched. `belay keygen` makes new certificates for both hosts; if a host's clock is wrong, set that."
        }
        SessionError::NoVerbs { .. } => "`belay check` says what this host has; --fabric tcp needs no RDMA.",
        _ => return None,
    })
}

/// How a command ends whose fabric failed before the guest had left the source.
pub fn exit(error: &FabricError) -> Exit {
    match error {
        FabricError::Unavailable { .. } | FabricError::Verbs(_) => Exit::NoFabric,
        _ => Exit::NotMoved,
    }
}

/// What to do where the fabric could not be set up. The guest has not left the source.
pub fn advice(error: &FabricError) -> &'static str {
    match error {
        FabricError::Unavailable { fabric: FabricKind::Verbs, .. } | FabricError::Verbs(_) => {
            "The guest runs on at the source. `belay check`, there and here, says what a host lacks; --fabric tcp needs no RDMA."
        }
        _ => "The guest runs on at the source. `belay check`, there and here, says what a host lacks.",
    }
}

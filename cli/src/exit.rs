//! Exit codes, one an outcome (P9). Listed in `belay help exit-codes` and the README; they never change their meaning.

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Done = 0,
    /// A failure that none of the others names.
    Failed = 1,
    /// The command line or the configuration file is wrong; nothing was touched.
    Usage = 2,
    /// This host lacks something needed; `belay check` says what.
    Missing = 3,
    /// No session with the peer: unreachable, refused, wrong certificate, other version. The guest was not touched.
    NoSession = 4,
    /// The migration ended before the switch; the guest runs at the source.
    NotMoved = 5,
    /// The fabric could not be set up between the two hosts; the guest runs at the source.
    NoFabric = 6,
    /// No VMM or memory of a process that died waits to be taken over.
    NothingToTakeOver = 7,
    /// What is to be taken over is still held by a process that runs.
    StillHeld = 8,
    /// What a process that died left behind is damaged or does not fit together.
    KeptDamaged = 9,
    /// No belay process of that name runs here.
    NoSuchMigration = 30,
    /// The order was refused; nothing was changed.
    OrderRefused = 31,
    /// The order was accepted, and has not come to pass (in the time given).
    NotInTime = 32,
    /// The destination was lost and the guest runs at the source again, from the newest committed checkpoint.
    Caught = 10,
    /// The guest is stopped here with its memory kept, because the other host could not be heard.
    Fenced = 11,
    /// Neither host can run the guest.
    Lost = 12,
    /// The source has taken the guest back; what this host held is void.
    Retired = 13,
    /// The destination is gone but its death is not proven, and the output mode forbids an automatic catch.
    CatchNeedsOperator = 14,
    /// The arbiter says that the destination has made the guest its own; it was not resumed here.
    Ceded = 15,
    /// The witness found memory or output that is not what it must be.
    CheckFailed = 20,
    /// Ended by SIGINT or SIGTERM.
    Interrupted = 130,
}

impl Exit {
    /// The code a shell sees.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// The table for `--help` and the README.
pub const TABLE: &str = "\
Exit codes:
    0  done as asked                        10  caught: the guest runs at the source again
    1  a failure none of the others names   11  fenced: guest stopped here, memory kept
    2  wrong command line or configuration  12  lost: neither host can run the guest
    3  this host lacks something needed     13  retired: the source has taken the guest back
    4  no session with the peer             14  a catch waits for the operator's word
    5  not moved: guest runs at the source  15  ceded: the arbiter gave it to the destination
    6  no fabric: RDMA could not be set up  20  the witness found wrong memory or output
    7  nothing there to take over           30  no such migration on this host
    8  still held by a process that runs    31  order refused, nothing was changed
    9  what was left is damaged             32  order accepted, not come to pass
                                            130 ended by SIGINT or SIGTERM";

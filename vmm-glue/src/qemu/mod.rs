//! QEMU as it is packaged: spoken to over QMP, looked at through /proc, never patched.
//!
//! ```text
//!   qmp      the QEMU Machine Protocol: one request at a time, each with a deadline; events in order
//!   process  who is behind the socket: pid, pidfd, mappings, open devices
//!   inspect  what the guest is made of: RAM blocks and their files, other memory, devices, disks
//!   relay    what a guest sends, held until its checkpoint has committed
//!   judge    what of it belay can move and tether, and what to change where it cannot
//! ```

pub mod inspect;
pub mod judge;
pub mod process;
pub mod qmp;
pub mod relay;

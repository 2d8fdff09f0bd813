//! QEMU as it is packaged: spoken to over QMP, looked at through /proc, never patched.
//!
//! ```text
//!   qmp      the QEMU Machine Protocol: one request at a time, each with a deadline; events in order
//!   process  who is behind the socket: pid, pidfd, mappings, open devices
//!   inspect  what the guest is made of: RAM blocks and their files, other memory, devices, disks
//!   inject   a userfaultfd of its address space, made by one of its threads
//!   judge    what of it belay can move and tether, and what to change where it cannot
//! ```

pub mod inject;
pub mod inspect;
pub mod judge;
pub mod process;
pub mod qmp;

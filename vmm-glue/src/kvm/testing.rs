//! What tests of several kinds of guests need.

use belay_checkpoint::guest::{Packet, PacketSink};

/// Takes whatever a guest sends, and keeps none of it.
pub(super) struct Nowhere;

impl PacketSink for Nowhere {
    fn emit(&self, _: Packet) {}

    fn has_room(&self) -> bool {
        true
    }
}

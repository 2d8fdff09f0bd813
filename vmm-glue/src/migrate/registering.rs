//! What is told of registering memory with an RDMA device, and of placing things near it. Other fabrics register nothing.

use super::observation::{Kind, ObservationId, Observer, us};
use belay_transport::fabric::{FabricKind, Registering, RegistrationObserver};
use belay_transport::numa::{NumaChoice, NumaError, Placement};
use belay_transport::region::Mapping;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes between two reports of how far it is.
const REPORT: u64 = 64 << 20;

/// Adds up what a session registers.
#[derive(Debug, Clone)]
pub(super) struct Registrations {
    observer: Observer,
    because: ObservationId,
    sum: Arc<Mutex<Sum>>,
}

#[derive(Debug, Default)]
struct Sum {
    /// Done of the mapping under way when it was last told of.
    told_bytes: u64,
    /// Of mappings that are done, since it was last taken.
    bytes: u64,
    regions: u64,
    stale_bytes: u64,
    /// Of the whole session.
    pinned_bytes: u64,
}

impl Registrations {
    pub(super) fn new(observer: &Observer, because: &ObservationId) -> Self {
        Self { observer: observer.clone(), because: because.clone(), sum: Arc::default() }
    }

    /// For the fabric, which calls it from its own threads.
    pub(super) fn ears(&self) -> RegistrationObserver {
        let own = self.clone();
        Arc::new(move |progress| own.hear(progress))
    }

    fn hear(&self, progress: Registering) {
        let Registering { done_bytes, total_bytes, regions, pinned_bytes, stale_bytes } = progress;
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        sum.pinned_bytes = sum.pinned_bytes.max(pinned_bytes);
        let tell = done_bytes >= sum.told_bytes + REPORT;
        if done_bytes == total_bytes {
            sum.bytes += total_bytes;
            sum.regions += regions;
            sum.stale_bytes += stale_bytes;
            sum.told_bytes = 0;
        } else if tell {
            sum.told_bytes = done_bytes;
        }
        drop(sum);
        if tell {
            let kind = Kind::Registering { done_bytes, total_bytes, regions, pinned_bytes };
            self.observer.note(Some(&self.because), kind);
        }
    }

    /// What has been registered since this was last asked, if anything.
    pub(super) fn take(&self, took: Duration) -> Option<Kind> {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        let pinned_bytes = sum.pinned_bytes;
        let Sum { bytes, regions, stale_bytes, .. } =
            std::mem::replace(&mut *sum, Sum { pinned_bytes, ..Sum::default() });
        let kind = Kind::Registered { bytes, regions, pinned_bytes, stale_bytes, took_us: us(took) };
        (regions > 0).then_some(kind)
    }
}

/// Decides where the session's threads and buffers go. Told where a device is in play or the operator has said something.
pub(super) fn place(
    choice: NumaChoice,
    fabric: FabricKind,
    device_node: Option<u32>,
    observer: &Observer,
    because: &ObservationId,
) -> Result<Placement, NumaError> {
    let placement = Placement::decide(choice, device_node)?;
    if fabric == FabricKind::Verbs || choice != NumaChoice::Auto {
        let node = match &placement {
            Placement::Near(node) => Some(node.number),
            Placement::Anywhere { .. } => None,
        };
        observer.note(Some(because), Kind::Placed { node, what: placement.to_string() });
    }
    Ok(placement)
}

/// Asks for `mapping`'s frames near the device. Where the kernel will not, that costs speed only, and is told.
pub(super) fn prefer(placement: &Placement, mapping: &Mapping, observer: &Observer, because: &ObservationId) {
    if let Err(error) = placement.prefer(mapping) {
        let what = format!("buffers anywhere: this process may not place memory ({error})");
        observer.note(Some(because), Kind::Placed { node: None, what });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(tell: impl FnOnce(&Registrations)) -> Vec<Kind> {
        let (notes, take) =
            (Arc::new(Mutex::new(Vec::new())), |notes: &Arc<Mutex<Vec<Kind>>>| notes.lock().unwrap().clone());
        let into = notes.clone();
        let observer = Observer::new("test", move |observation| into.lock().unwrap().push(observation.kind.clone()));
        let because = observer.note(None, Kind::Prepared { took_us: 0 });
        tell(&Registrations::new(&observer, &because));
        take(&notes).split_off(1)
    }

    fn progress(done_mib: u64, total_mib: u64, regions: u64, pinned_mib: u64) -> Registering {
        let mib = |count: u64| count << 20;
        Registering {
            done_bytes: mib(done_mib),
            total_bytes: mib(total_mib),
            regions,
            pinned_bytes: mib(pinned_mib),
            stale_bytes: 0,
        }
    }

    #[test]
    fn a_long_registration_is_told_now_and_then_and_added_up() {
        let notes = heard(|registrations| {
            let ears = registrations.ears();
            for done in (10..=200).step_by(10) {
                ears(progress(done, 200, done / 10, done));
            }
            // A small one after it, as of a ring.
            ears(progress(1, 1, 1, 201));
            let Some(Kind::Registered { bytes, regions, pinned_bytes, stale_bytes, took_us }) =
                registrations.take(Duration::from_millis(5))
            else {
                panic!("something was registered")
            };
            assert_eq!((bytes >> 20, regions, pinned_bytes >> 20, stale_bytes, took_us), (201, 21, 201, 0, 5000));
            assert!(registrations.take(Duration::ZERO).is_none(), "each is told once");
            // At the switch.
            ears(Registering { stale_bytes: 4096, ..progress(2, 2, 1, 203) });
            assert!(matches!(
                registrations.take(Duration::ZERO),
                Some(Kind::Registered { regions: 1, stale_bytes: 4096, pinned_bytes, .. }) if pinned_bytes == 203 << 20
            ));
        });
        let told: Vec<u64> = notes
            .iter()
            .map(|kind| match kind {
                Kind::Registering { done_bytes, total_bytes, .. } if *total_bytes == 200 << 20 => done_bytes >> 20,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, [70, 140], "every 64 MiB and no oftener");
    }

    #[test]
    fn where_things_go_is_told_when_it_matters() {
        let notes = heard(|registrations| {
            let place =
                |choice, fabric| place(choice, fabric, None, &registrations.observer, &registrations.because).unwrap();
            place(NumaChoice::Auto, FabricKind::Tcp);
            place(NumaChoice::Off, FabricKind::Tcp);
            place(NumaChoice::Auto, FabricKind::Verbs);
        });
        assert_eq!(notes.len(), 2);
        assert!(
            notes.iter().all(|kind| matches!(kind, Kind::Placed { node: None, what } if what.contains("anywhere")))
        );
    }
}

//! The data path allocates nothing once a lane is open (without TLS, which keeps its own buffers).

mod common;

use common::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is handed on to the system allocator unchanged; counting touches a thread-local cell that needs neither
// allocation nor destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn count(mut work: impl FnMut()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(count(|| drop(std::hint::black_box(Box::new([0_u8; 64])))), 1);
}

#[test]
fn reads_writes_and_commits_allocate_nothing() {
    for over in [Over::Local, Over::Tcp] {
        let mut world = world(over);
        let mut lane = world.lane(CHECKPOINT, 64);
        let reads: Vec<_> = (0..64).map(|id| world.read(id, id as usize * 8192, 8192)).collect();
        let writes: Vec<_> = (0..40).map(|id| world.write(id, 0, id as usize * 16_384, 16_384)).collect();
        let trailer = world.write(99, 0, 700_000, 8);
        let mut done = [0; 64];
        let allocated = count(|| {
            for _ in 0..10 {
                lane.post_reads(&reads).unwrap();
                while lane.outstanding() > 0 {
                    lane.wait(soon()).unwrap();
                    lane.poll(&mut done).unwrap();
                }
                lane.post_writes(&writes).unwrap();
                lane.commit(&trailer, soon()).unwrap();
            }
        });
        assert_eq!(allocated, 0, "{over:?}");
    }
}

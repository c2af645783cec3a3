//! Guards against schedules that tests do not meet: a block that is freed while somebody reads it, or by two, or never.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-shm --release --test loom_cell --target-dir target/loom`
//!
//! # Safety
//!
//! Links are addresses of boxes, which are given back to `Box` once: that is what the models check, by loom's cells.
#![cfg(loom)]
#![allow(unsafe_code)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize as ModelUsize;
use loom::thread;
use netmcore_sem::current::{act_as, die};
use netmcore_sem::{Current, Owners};
use netmcore_shm::epoch::pins::{Era, Slot, owner_word};
use netmcore_shm::epoch::retired::Node;
use netmcore_shm::epoch::versions::Versions;
use std::sync::atomic::{AtomicUsize, Ordering};

#[repr(C)]
struct Block {
    node: Node,
    /// Read by readers, written by the one that frees: loom says so if both do it at the same time, or after.
    value: UnsafeCell<u32>,
}

struct World {
    era: Era,
    slots: [Slot; 2],
    /// Above the index of every slot that was claimed.
    used: ModelUsize,
    versions: Versions,
    /// Not of the model.
    alive: AtomicUsize,
}

impl World {
    fn new() -> Arc<World> {
        World::with_slots(2)
    }

    fn with_slots(used: usize) -> Arc<World> {
        let era = Era::default();
        let first = block(&era, 0);
        Arc::new(World {
            slots: [Slot::default(), Slot::default()],
            used: ModelUsize::new(used),
            versions: Versions::new(first),
            era,
            alive: AtomicUsize::new(1),
        })
    }

    fn make(&self, value: u32) -> u64 {
        self.alive.fetch_add(1, Ordering::Relaxed);
        block(&self.era, value)
    }

    fn free(&self, link: u64) {
        let at = std::ptr::with_exposed_provenance_mut::<Block>(link as usize);
        // SAFETY: see the file; that nobody reads it is checked by the cell.
        let block = unsafe { Box::from_raw(at) };
        // SAFETY: as above.
        block.value.with_mut(|value| unsafe { *value = u32::MAX });
        self.alive.fetch_sub(1, Ordering::Relaxed);
    }

    /// What is read under the slot, which is pinned.
    fn value(&self, link: u64) -> u32 {
        let at = std::ptr::with_exposed_provenance::<Block>(link as usize);
        // SAFETY: pinned.
        let block = unsafe { &*at };
        // SAFETY: that nobody frees it meanwhile is checked by the cell.
        block.value.with(|value| unsafe { *value })
    }

    fn read(&self, slot: usize) -> u64 {
        self.slots[slot].read(&self.era, |cover| self.versions.load(cover))
    }

    fn pin(&self, slot: usize) {
        self.slots[slot].pin(&self.era);
    }

    fn replace(&self, value: u32, doubt: bool) -> u32 {
        let old = self.versions.swap(self.make(value));
        // Not retired yet.
        let seen = self.value(old);
        // SAFETY: swapped out by this thread.
        unsafe { self.versions.retired.push(old, &self.era) };
        self.reclaim(doubt);
        seen
    }

    fn reclaim(&self, doubt: bool) {
        let slots = || self.slots[..self.used.load(Ordering::SeqCst)].iter();
        let free = |link| self.free(link);
        // SAFETY: all slots; freed once.
        unsafe { self.versions.retired.reclaim(&self.era, slots, doubt, free) };
    }

    /// When all threads are done: nothing is left but the current version.
    fn end(&self) {
        self.reclaim(true);
        assert_eq!(self.alive.load(Ordering::Relaxed), 1);
        self.free(self.versions.peek());
    }
}

fn block(era: &Era, value: u32) -> u64 {
    let block = Box::new(Block {
        node: Node::born(era),
        value: UnsafeCell::new(value),
    });
    Box::into_raw(block).expose_provenance() as u64
}

fn me() -> u64 {
    owner_word(Current.me())
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn block_is_not_freed_under_a_reader() {
    check(4, || {
        let world = World::new();
        let reader = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                assert!(world.slots[0].claim(me(), false));
                for _ in 0..2 {
                    world.pin(0);
                    let seen = world.value(world.read(0));
                    assert!(seen <= 2);
                    world.slots[0].unpin();
                }
                world.slots[0].release(me());
            })
        };
        assert_eq!(world.replace(1, false), 0);
        assert_eq!(world.replace(2, false), 1);
        reader.join().unwrap();
        world.end();
    });
}

/// The second read may need to cover a later era than the pin did.
#[test]
fn nested_reads_keep_both_versions() {
    check(3, || {
        let world = World::new();
        let reader = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                assert!(world.slots[0].claim(me(), false));
                world.pin(0);
                let first = world.read(0);
                let seen = world.value(first);
                world.pin(0);
                let second = world.read(0);
                assert!(world.value(second) >= seen);
                world.slots[0].unpin();
                assert_eq!(world.value(first), seen);
                world.slots[0].unpin();
                world.slots[0].release(me());
            })
        };
        for value in 1..4 {
            world.replace(value, false);
        }
        reader.join().unwrap();
        world.end();
    });
}

#[test]
fn two_that_replace_free_each_block_once() {
    check(3, || {
        let world = World::new();
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                world.replace(10, false);
                world.replace(11, false);
            })
        };
        world.pin(1);
        let seen = world.read(1);
        let value = world.value(seen);
        world.replace(1, false);
        assert_eq!(world.value(seen), value);
        world.slots[1].unpin();
        other.join().unwrap();
        world.end();
    });
}

/// Nobody can replace what was expected by something that looks the same: the pin keeps the address from being used again.
#[test]
fn exchange_happens_only_if_nothing_was_swapped_between() {
    check(3, || {
        let world = World::new();
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                world.replace(10, false);
            })
        };
        world.pin(1);
        let seen = world.read(1);
        let expected = world.value(seen);
        let new = world.make(expected + 1);
        match world.versions.compare_exchange(seen, new) {
            Ok(()) => {
                // SAFETY: swapped out by this thread.
                unsafe { world.versions.retired.push(seen, &world.era) };
            }
            Err(_) => world.free(new),
        }
        world.slots[1].unpin();
        other.join().unwrap();
        let last = world.value(world.versions.peek());
        assert!(last == 10 || last == 1 && expected == 0 || last == 11 && expected == 10);
        world.end();
    });
}

/// A reader dies; its slot is taken over by a new reader while somebody scans.
#[test]
fn slot_of_a_dead_reader_is_taken_over() {
    check(3, || {
        let world = World::new();
        let dead = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                assert!(world.slots[0].claim(me(), false));
                world.pin(0);
                world.value(world.read(0));
                die();
            })
        };
        dead.join().unwrap();
        let heir = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(2);
                let mine = &world.slots[0];
                if mine.claim(me(), true) {
                    world.pin(0);
                    assert!(world.value(world.read(0)) <= 2);
                    mine.unpin();
                    mine.release(me());
                }
            })
        };
        world.replace(1, true);
        world.replace(2, true);
        heir.join().unwrap();
        world.end();
    });
}

/// A reader dies at any moment of its reading; what it kept is freed once that is known.
#[test]
fn dead_reader_keeps_nothing() {
    check(3, || {
        let world = World::new();
        let mortal = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                assert!(world.slots[0].claim(me(), false));
                world.pin(0);
                let first = world.read(0);
                let seen = world.value(first);
                assert!(world.value(world.read(0)) >= seen);
                assert_eq!(world.value(first), seen);
                die();
            })
        };
        world.replace(1, true);
        world.replace(2, true);
        mortal.join().unwrap();
        world.end();
    });
}

/// A thread reads for the first time while one replaces and another one has begun to free.
#[test]
fn first_slot_is_seen_by_those_who_free() {
    check(3, || {
        let world = World::with_slots(0);
        let reader = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(1);
                assert!(world.slots[0].claim(me(), false));
                world.used.fetch_max(1, Ordering::SeqCst);
                world.pin(0);
                assert!(world.value(world.read(0)) <= 1);
                world.slots[0].unpin();
                world.slots[0].release(me());
            })
        };
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                act_as(2);
                world.reclaim(false);
            })
        };
        world.replace(1, false);
        reader.join().unwrap();
        other.join().unwrap();
        world.end();
    });
}

//! Guards against places that overlap between processes, and regions that children do not find where they were.
//!
//! # Safety
//!
//! Shared memory is looked at as atomics, inside of regions that live as long as the test; forked copies of owned values are dropped in
//! children only.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::{AnonRegion, Arena, Error, SpaceLimit};
use netmcore_sys::process::{Limit, Resource, get_limit, set_limit};
use std::sync::atomic::{AtomicU64, Ordering};
use support::fork;

fn places_taken_in_different_processes_do_not_overlap() {
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    let results = AnonRegion::create(c"results", &arena, 1 << 16).unwrap();
    let words = results.at().cast::<AtomicU64>();
    // SAFETY: inside the region, aligned, atomics only.
    let word = |index: usize| unsafe { &*words.add(index) };
    const CHILDREN: usize = 4;
    const PLACES: usize = 50;
    let children: Vec<_> = (0..CHILDREN)
        .map(|child| {
            let arena = arena.clone();
            fork(move || {
                for place in 0..PLACES {
                    let at = arena.place(1).unwrap().at().addr();
                    word(child * PLACES + place).store(at as u64, Ordering::SeqCst);
                }
            })
        })
        .collect();
    assert!(children.iter().all(support::Child::ended_well));
    let mut places: Vec<u64> = (0..CHILDREN * PLACES)
        .map(|index| word(index).load(Ordering::SeqCst))
        .collect();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), CHILDREN * PLACES);
    let mine = arena.place(1).unwrap().at().addr() as u64;
    assert!(places.iter().all(|&place| place < mine));
}

fn region_is_shared_with_children_at_the_same_address() {
    let arena = Arena::reserve(Arena::DEFAULT_LEN_BYTES).unwrap();
    let region = AnonRegion::create(c"region", &arena, 64 << 30).unwrap();
    // SAFETY: in the region, aligned; atomics only.
    let last = unsafe { &*region.at().add((64 << 30) - 8).cast::<AtomicU64>() };
    let child = fork(|| last.store(7, Ordering::SeqCst));
    assert!(child.ended_well());
    assert_eq!(last.load(Ordering::SeqCst), 7);
    // A child that drops it takes nothing from us.
    let child = fork(|| drop_in_child(&region));
    assert!(child.ended_well());
    assert_eq!(last.load(Ordering::SeqCst), 7);
}

/// Drops a forked child's copy of what the parent keeps.
fn drop_in_child(region: &AnonRegion) {
    // SAFETY: the original is not used in this process again, which leaves without dropping it.
    drop(unsafe { std::ptr::read(region) });
}

fn dropped_region_is_gone_from_the_process() {
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    let region = AnonRegion::create(c"region", &arena, 4096).unwrap();
    // SAFETY: in the region, aligned; atomics only.
    let word = unsafe { &*region.at().cast::<AtomicU64>() };
    word.store(5, Ordering::SeqCst);
    let child = fork(|| {
        drop_in_child(&region);
        // A stale pointer meets nothing: SIGSEGV.
        std::hint::black_box(word.load(Ordering::SeqCst));
    });
    assert_eq!(child.signal(), Some(11));
    assert_eq!(word.load(Ordering::SeqCst), 5);
}

fn limited_address_space_gives_a_smaller_arena_or_an_error() {
    let old = get_limit(Resource::AddressSpaceBytes).unwrap();
    let limit = |gib: u64| Limit {
        soft: Some(gib << 30),
        hard: old.hard,
    };
    set_limit(Resource::AddressSpaceBytes, limit(9)).unwrap();
    let arena = Arena::reserve(Arena::DEFAULT_LEN_BYTES).unwrap();
    assert_eq!(arena.len_bytes(), 8 << 30);
    // What is left is of use as long as a few regions fit into it.
    let mut smaller = Vec::new();
    let refused = loop {
        match Arena::reserve(Arena::DEFAULT_LEN_BYTES) {
            Ok(arena) => smaller.push(arena),
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, Error::Reserve { .. }), "{refused:?}");
    let lens = smaller.iter().map(Arena::len_bytes);
    assert!(lens.clone().is_sorted_by(|one, next| one >= next));
    assert!(lens.clone().all(|len| (128 << 20..1 << 30).contains(&len)));
    assert_eq!(lens.min(), Some(128 << 20));
    drop((arena, smaller));
    set_limit(Resource::AddressSpaceBytes, limit(5)).unwrap();
    let arena = Arena::reserve(Arena::DEFAULT_LEN_BYTES).unwrap();
    assert_eq!(arena.len_bytes(), 4 << 30);
}

fn limited_file_size_is_an_error_and_not_a_signal() {
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    let old = get_limit(Resource::FileSizeBytes).unwrap();
    let limit = Limit {
        soft: Some(1 << 20),
        hard: old.hard,
    };
    set_limit(Resource::FileSizeBytes, limit).unwrap();
    match AnonRegion::create(c"region", &arena, 2 << 20) {
        Err(Error::NoSpace {
            limit: SpaceLimit::FileSize,
            free_bytes,
            ..
        }) => assert_eq!(free_bytes, 1 << 20),
        other => panic!("{other:?}"),
    }
    assert!(AnonRegion::create(c"region", &arena, 1 << 20).is_ok());

    let limit = Limit {
        soft: Some(100),
        hard: old.hard,
    };
    set_limit(Resource::FileSizeBytes, limit).unwrap();
    assert!(matches!(
        Arena::reserve(Arena::MIN_LEN_BYTES),
        Err(Error::NoSpace {
            limit: SpaceLimit::FileSize,
            free_bytes: 100,
            ..
        })
    ));
}

netmcore_forktest::forktests!(
    places_taken_in_different_processes_do_not_overlap,
    region_is_shared_with_children_at_the_same_address,
    dropped_region_is_gone_from_the_process,
    limited_address_space_gives_a_smaller_arena_or_an_error,
    limited_file_size_is_an_error_and_not_a_signal,
);

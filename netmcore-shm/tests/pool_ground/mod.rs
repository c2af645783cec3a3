//! A pool for a test and its children, and what the tests do with its runs.
//!
//! # Safety
//!
//! Each run has one user at a time, but where it is passed on, and its words are looked at as atomics. Shared memory beside the pool holds
//! atomics only.

#![allow(dead_code, unsafe_code)]

use crate::support::PATIENCE;
use netmcore_shm::{AnonRegion, Arena, NoRecord, ObjectName, PagePool, PoolRef, Region, ShmObject};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub const PAGE: usize = PagePool::PAGE_BYTES;
/// A pool in a region with a name, which is unlinked at the end, and words that the processes of a test share.
pub struct Ground {
    pub arena: Arena,
    pub board: AnonRegion,
    pub name: ObjectName,
    pub pool: PagePool,
}

impl Ground {
    pub fn new(max_len_bytes: usize) -> Ground {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES.max(2 * max_len_bytes)).unwrap();
        let board = AnonRegion::create(c"board", &arena, 4096).unwrap();
        let name = ObjectName::unique(b"/pool_test_").unwrap();
        let region = Region::create(&arena, &name, 4096, max_len_bytes, &NoRecord).unwrap();
        let pool = PagePool::create(&region, PAGE).unwrap();
        Ground {
            arena,
            board,
            name,
            pool,
        }
    }

    /// The memory that the region's object really has.
    pub fn memory_bytes(&self) -> u64 {
        let path = format!("/dev/shm{}", self.name);
        std::fs::metadata(path).unwrap().blocks() * 512
    }

    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < 512);
        // SAFETY: in the page, which is mapped as long as this lives.
        unsafe { &*self.board.at().cast::<AtomicU64>().add(index) }
    }

    pub fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    /// Waits until the word is not 0.
    pub fn get(&self, index: usize) -> u64 {
        let limit = Instant::now() + PATIENCE;
        loop {
            let value = self.word(index).load(Ordering::SeqCst);
            if value != 0 {
                return value;
            }
            assert!(Instant::now() < limit, "nobody sets word {index}");
            std::thread::yield_now();
        }
    }

    /// Nothing is lost: with no run in use, all the memory is one free run, and the system has all that is not bookkeeping.
    pub fn check_whole(&self) {
        self.pool.reclaim_dead();
        self.pool.verify().unwrap();
        let stats = self.pool.stats();
        assert_eq!((stats.in_use_bytes, stats.in_use_runs), (0, 0));
        assert_eq!(stats.free_bytes, stats.total_bytes);
        assert_eq!(stats.largest_free_bytes, stats.total_bytes);
        self.check_memory();
        self.pool.trim();
        let stats = self.pool.stats();
        assert_eq!(stats.kept_bytes, 0);
        self.check_memory();
    }

    /// The memory is what the statistics say, but for some of the map that a dead one made present and did not tell.
    pub fn check_memory(&self) {
        let (said, memory) = (self.pool.stats().committed_bytes, self.memory_bytes());
        assert!(said <= memory, "{said} bytes committed, {memory} there");
        assert!(
            memory <= said + 32_768,
            "{said} bytes committed, {memory} there"
        );
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = ShmObject::unlink(&self.name, &NoRecord);
        let region = self.pool.region();
        // It stays mapped, and would keep its memory.
        // SAFETY: the test is over.
        let _ = unsafe { region.punch(0, region.max_len_bytes() as u64) };
    }
}

pub fn words_of(run: NonNull<u8>, len_bytes: usize) -> impl Iterator<Item = &'static AtomicU64> {
    // At the start and at the end of each page.
    (0..len_bytes / PAGE)
        .flat_map(|page| [page * PAGE, page * PAGE + PAGE - 8])
        .map(move |offset| {
            // SAFETY: in bounds of a run in use, aligned, and mapped until the process ends.
            unsafe { &*run.as_ptr().add(offset).cast::<AtomicU64>() }
        })
}

pub fn fill(run: NonNull<u8>, len_bytes: usize, of: u64) {
    for (index, word) in words_of(run, len_bytes).enumerate() {
        word.store(of << 32 | index as u64, Ordering::Relaxed);
    }
}

pub fn check(run: NonNull<u8>, len_bytes: usize, of: u64) {
    for (index, word) in words_of(run, len_bytes).enumerate() {
        let expected = of << 32 | index as u64;
        assert_eq!(
            word.load(Ordering::Relaxed),
            expected,
            "{run:?} of {of} at {index}"
        );
    }
}

/// Takes a run and fills it.
pub fn take(pool: PoolRef, page_count: usize, of: u64) -> NonNull<u8> {
    let run = pool.alloc_run_noted(page_count, of).unwrap();
    fill(run, page_count * PAGE, of);
    run
}

/// Checks a run and frees it.
pub fn free(pool: PoolRef, run: NonNull<u8>, of: u64) {
    check(run, pool.run_len_bytes(run.as_ptr()).unwrap(), of);
    // SAFETY: the tests give each run to one user.
    unsafe { pool.free_run(run) }.unwrap();
}

/// What the layer above does for a dead user: frees what was its own. Returns how many runs.
pub fn free_all(pool: PoolRef, of: u64) -> usize {
    let theirs: Vec<_> = pool.runs().filter(|run| run.note == of).collect();
    for run in &theirs {
        // SAFETY: the user is dead.
        unsafe { pool.free_run(run.at) }.unwrap();
    }
    theirs.len()
}

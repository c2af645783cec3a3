//! Guards against schedules that tests do not meet: a block that two have, a page that is given back under somebody, or twice.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-shm --release --test loom_heap --target-dir target/loom`
//!
//! The bitmaps are those of the heap; the steps around them, which the heap takes with addresses of shared memory, are told here again, in the
//! same order. A block is a cell, and so is the page: loom says so if two use one at the same time, or one whose former use is not known to be over.
//!
//! # Safety
//!
//! The contents of cells are used where loom checks that nobody else uses them.
#![cfg(loom)]
#![allow(unsafe_code)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use loom::thread;
use netmcore_shm::heap::bitmaps::{Word, turn};
use std::sync::atomic::AtomicUsize;

/// Notes: `Small(owner)` is the owner's number.
const ABANDONED: u64 = 100;
const PREPARING: u64 = 101;

const BLOCKS: usize = 3;
const EXISTING: u64 = (1 << BLOCKS) - 1;

/// A page of blocks and its note.
struct Page {
    local: AtomicU64,
    remote: AtomicU64,
    dead: AtomicU64,
    note: AtomicU64,
    /// Written by whoever gives the page back, read by whoever looks at its header.
    memory: UnsafeCell<()>,
    /// Whether somebody has the block; used by the one who has it, or is about to.
    blocks: [UnsafeCell<bool>; BLOCKS],
    deaths: AtomicU64,
    /// Not of the model.
    given_back: AtomicUsize,
}

impl Page {
    /// Of the owner 1.
    fn new() -> Arc<Page> {
        Arc::new(Page {
            local: AtomicU64::new(0),
            remote: AtomicU64::new(0),
            dead: AtomicU64::new(0),
            note: AtomicU64::new(1),
            memory: UnsafeCell::new(()),
            blocks: std::array::from_fn(|_| UnsafeCell::new(false)),
            deaths: AtomicU64::new(0),
            given_back: AtomicUsize::new(0),
        })
    }

    /// The header, which is there as long as the page is not given back.
    fn word(&self) -> Word<'_> {
        self.memory.with(|_| ());
        Word {
            local: &self.local,
            remote: &self.remote,
            dead: &self.dead,
        }
    }

    fn use_block(&self, block: usize, was: bool, is: bool) {
        self.blocks[block].with_mut(|has| {
            // SAFETY: that nobody else uses the block is checked by the cell.
            let has = unsafe { &mut *has };
            assert_eq!(std::mem::replace(has, is), was);
        });
    }

    /// By the owner: the free blocks, which it may allocate one by one.
    fn open(&self) -> u64 {
        let free = !self.word().in_use() & EXISTING;
        if free != 0 {
            self.word().unmark_free();
        }
        free
    }

    /// By the owner: a block of those that were free when it opened the page.
    fn allocate(&self, free: &mut u64) -> usize {
        let block = free.trailing_zeros() as usize;
        *free &= *free - 1;
        turn(self.word().local, 1 << block);
        self.use_block(block, false, true);
        block
    }

    fn free_locally(&self, block: usize) {
        self.use_block(block, true, false);
        turn(self.word().local, 1 << block);
    }

    /// By anybody else, under this number.
    fn free_remotely(&self, me: u64, block: usize) {
        self.use_block(block, true, false);
        let note = self.note.load(Acquire);
        let is_last = self.word().in_use() == 1 << block;
        self.word().turn_remote(1 << block);
        if is_last && note == ABANDONED && self.become_owner(ABANDONED, me) {
            if !self.give_back_if_empty(me) {
                self.abandon(me);
            }
        }
    }

    fn become_owner(&self, from: u64, me: u64) -> bool {
        self.note
            .compare_exchange(from, me, AcqRel, Acquire)
            .is_ok()
    }

    fn abandon(&self, me: u64) {
        assert!(self.become_owner(me, ABANDONED));
    }

    /// By the owner, which is not it any more if this is true.
    fn give_back_if_empty(&self, me: u64) -> bool {
        if self.word().in_use() != 0 {
            return false;
        }
        assert!(self.become_owner(me, PREPARING));
        self.memory.with_mut(|_| ());
        (0..BLOCKS).for_each(|block| self.use_block(block, false, false));
        assert_eq!(self.given_back.fetch_add(1, Relaxed), 0);
        true
    }

    /// By the owner 1, which stops there.
    fn die(&self) {
        self.deaths.store(1, Release);
    }

    /// By somebody who needs a page; whether it has got it, with blocks in it.
    fn adopt(&self, me: u64) -> bool {
        let note = self.note.load(Acquire);
        let is_dead = note == 1 && self.deaths.load(Acquire) == 1;
        if note != ABANDONED && !is_dead || !self.become_owner(note, me) {
            return false;
        }
        if self.give_back_if_empty(me) {
            return false;
        }
        if is_dead {
            self.word().mark_dead();
        }
        true
    }

    fn is_given_back(&self) -> bool {
        self.given_back.load(Relaxed) == 1
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn in_a_thread(page: &Arc<Page>, body: impl FnOnce(&Page) + 'static) -> thread::JoinHandle<()> {
    let page = page.clone();
    thread::spawn(move || body(&page))
}

/// The owner goes on allocating and freeing in the word in which two others free.
#[test]
fn block_that_others_free_is_allocated_once_they_are_done() {
    check(3, || {
        let page = Page::new();
        let mut free = page.open();
        let [first, second] = [(); 2].map(|()| page.allocate(&mut free));
        let others = [(2, first), (3, second)]
            .map(|(me, block)| in_a_thread(&page, move |page| page.free_remotely(me, block)));
        let third = page.allocate(&mut free);
        page.free_locally(third);
        let mut free = page.open();
        let again: Vec<_> = (0..free.count_ones())
            .map(|_| page.allocate(&mut free))
            .collect();
        others.into_iter().for_each(|other| other.join().unwrap());
        again.into_iter().for_each(|block| page.free_locally(block));
        assert_eq!(page.open(), EXISTING);
        assert!(page.give_back_if_empty(1));
    });
}

/// The owner dies after any of its steps; two would like to have its page, while what it gave away is freed.
#[test]
fn page_of_the_dead_has_one_heir_and_nothing_twice() {
    for steps in 0..=4 {
        check(2, move || {
            let page = Page::new();
            let mut free = page.open();
            let given = page.allocate(&mut free);
            let owner = in_a_thread(&page, move |page| {
                let mut mine = None;
                for step in 0..steps {
                    match mine.take() {
                        Some(block) if step % 2 == 1 => page.free_locally(block),
                        _ => mine = Some(page.allocate(&mut free)),
                    }
                }
                page.die();
            });
            let other = in_a_thread(&page, move |page| page.free_remotely(2, given));
            let heir = in_a_thread(&page, |page| use_as_heir(page, 3));
            use_as_heir(&page, 4);
            for thread in [owner, other, heir] {
                thread.join().unwrap();
            }
            // By whoever has the page now: what is in use was the dead one's.
            if !page.is_given_back() {
                let lost = page.word().in_use();
                assert_eq!(lost.count_ones(), steps % 2);
            }
        });
    }
}

/// Adopts the page, if it can be had; takes a block, and frees it.
fn use_as_heir(page: &Page, me: u64) {
    if !page.adopt(me) {
        return;
    }
    let mut free = page.open();
    let block = page.allocate(&mut free);
    page.free_locally(block);
    // What others free meanwhile is not taken for one of the dead when it is allocated.
    let mut free = page.open();
    let block = page.allocate(&mut free);
    assert_eq!(page.word().in_use_of_dead() & 1 << block, 0);
    page.free_locally(block);
}

/// The owner ends in order, while two others free the last blocks, and a third looks for a page.
#[test]
fn abandoned_page_is_given_back_once_and_by_the_last() {
    check(3, || {
        let page = Page::new();
        let mut free = page.open();
        let [first, second] = [(); 2].map(|()| page.allocate(&mut free));
        let others = [(2, first), (3, second)]
            .map(|(me, block)| in_a_thread(&page, move |page| page.free_remotely(me, block)));
        if !page.give_back_if_empty(1) {
            page.abandon(1);
            if page.adopt(4) && !page.give_back_if_empty(4) {
                page.abandon(4);
            }
        }
        others.into_iter().for_each(|other| other.join().unwrap());
        // An empty page may be left, for whoever needs one.
        if !page.is_given_back() {
            assert_eq!(page.word().in_use(), 0);
            assert!(page.become_owner(ABANDONED, 5));
            assert!(page.give_back_if_empty(5));
        }
    });
}

//! Guards against schedules that tests do not meet: an element that is read while it is written, a segment used after it was retired, a sleeper that nobody wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p netmcore-shm --release --test loom_queues`
//!
//! # Safety
//!
//! Cells are reached through loom's, which checks that nobody writes while others read.

#![cfg(loom)]
#![allow(unsafe_code)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use loom::thread;
use netmcore_sem::Current;
use netmcore_sem::current::{act_as, die};
use netmcore_sem::{Owners, WaitWord};
use netmcore_shm::collections::enrolment;
use netmcore_shm::collections::mailbox::slots::{Arrived, Slots};
use netmcore_shm::collections::queue::ends::{
    CLOSED_BY_CALL, Ends, Laps, PRODUCERS_GONE, Place, Segment, Segments,
};

/// Runs in a thread of its own that acts under `index`.
fn spawn<S: 'static, R: 'static>(
    shared: &Arc<S>,
    index: u32,
    body: impl FnOnce(&S) -> R + 'static,
) -> thread::JoinHandle<R> {
    let shared = shared.clone();
    thread::spawn(move || {
        act_as(index);
        body(&shared)
    })
}

fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// The memory of a segment: written when it is retired, read at each use, so that loom finds a use after it.
struct Memory {
    segment: Segment,
    in_use: UnsafeCell<bool>,
    cells: Vec<UnsafeCell<u64>>,
}

/// A queue of numbers.
struct Queue {
    ends: Ends,
    memory: Vec<Memory>,
    /// How many segments were handed out; addresses are counted from 1.
    allocated: AtomicU64,
    roll: [AtomicU64; 1],
    /// Counts what was pushed in good order.
    pushed: AtomicU32,
}

impl Segments for Queue {
    fn segment(&self, address: u64) -> &Segment {
        let memory = &self.memory[address as usize - 1];
        // SAFETY: loom's cell.
        memory
            .in_use
            .with(|at| assert!(unsafe { *at }, "used after it was retired"));
        &memory.segment
    }

    fn retire(&self, address: u64) {
        // SAFETY: loom's cell.
        self.memory[address as usize - 1]
            .in_use
            .with_mut(|at| unsafe { *at = false });
    }
}

impl Queue {
    fn new(laps: Laps, segments: usize) -> Arc<Queue> {
        let memory = |_| Memory {
            segment: Segment::new(),
            in_use: UnsafeCell::new(true),
            cells: (0..laps.per_lap()).map(|_| UnsafeCell::new(0)).collect(),
        };
        Arc::new(Queue {
            ends: Ends::new(laps, 1),
            memory: (0..segments).map(memory).collect(),
            allocated: AtomicU64::new(1),
            roll: [AtomicU64::new(0)],
            pushed: AtomicU32::new(0),
        })
    }

    fn cell(&self, place: Place) -> &UnsafeCell<u64> {
        &self.memory[place.segment as usize - 1].cells[place.index as usize]
    }

    /// As the queue's: `None` if it is full, false if it is closed.
    fn try_push(&self, value: u64) -> Option<bool> {
        loop {
            let mut turn = self.ends.push_turn(None)?;
            if turn.is_closed() {
                return Some(false);
            }
            if !turn.has_room() {
                return None;
            }
            let Some(place) = turn.place(self) else {
                drop(turn);
                let address = self.allocated.fetch_add(1, Ordering::Relaxed) + 1;
                if let Err(address) = self.ends.give_spare(address) {
                    self.retire(address);
                }
                continue;
            };
            // SAFETY: loom's cell.
            self.cell(place).with_mut(|at| unsafe { *at = value });
            turn.commit(1);
            drop(turn);
            self.ends.wake_popper();
            return Some(true);
        }
    }

    fn push(&self, value: u64) -> bool {
        loop {
            if let Some(done) = self.try_push(value) {
                return done;
            }
            let room = self.ends.room().wait(&Current, None, None, || {
                (!self.ends.looks_full() || self.ends.closed() != 0).then_some(())
            });
            assert_eq!(room, Some(()));
        }
    }

    fn try_pop(&self) -> Option<u64> {
        let mut turn = self.ends.pop_turn(None)?;
        if !turn.has_item() {
            return None;
        }
        // SAFETY: loom's cell.
        let value = self.cell(turn.place(self)).with(|at| unsafe { *at });
        turn.commit(1);
        drop(turn);
        self.ends.wake_pusher();
        Some(value)
    }

    /// `None` if the queue is closed.
    fn pop(&self) -> Option<u64> {
        let gained = self.ends.items().wait(&Current, None, None, || {
            if !self.ends.looks_empty()
                && let Some(value) = self.try_pop()
            {
                return Some(Some(value));
            }
            let close = || {
                let is_gone = || enrolment::are_all_gone(&self.roll);
                is_gone() && self.ends.close_if(PRODUCERS_GONE, None, is_gone) != 0
            };
            (self.ends.closed() != 0 || close()).then_some(None)
        });
        // Without a deadline it gives something. What was pushed before the queue was closed is still there.
        gained.unwrap().or_else(|| self.try_pop())
    }
}

#[test]
fn elements_pass_through_one_place_in_order() {
    bounded(4, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let popper = spawn(&queue, 1, |queue| [queue.pop(), queue.pop()]);
        assert!(queue.push(1) && queue.push(2));
        assert_eq!(popper.join().unwrap(), [Some(1), Some(2)]);
        assert!(queue.ends.looks_empty());
    });
}

#[test]
fn two_pushers_lose_nothing() {
    bounded(2, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let pusher = spawn(&queue, 1, |queue| assert!(queue.push(1)));
        let popper = spawn(&queue, 2, |queue| {
            queue.pop().unwrap() + queue.pop().unwrap()
        });
        assert!(queue.push(2));
        pusher.join().unwrap();
        assert_eq!(popper.join().unwrap(), 3);
    });
}

#[test]
fn two_poppers_lose_nothing() {
    bounded(2, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let poppers = [1, 2].map(|index| spawn(&queue, index, |queue| queue.pop().unwrap()));
        assert!(queue.push(1) && queue.push(2));
        let [a, b] = poppers.map(|popper| popper.join().unwrap());
        assert_eq!(a + b, 3);
    });
}

/// Places that wrap around: what a pusher writes, the popper is through with.
#[test]
fn places_are_used_again_when_they_are_free() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(2), 1);
        let popper = spawn(&queue, 1, |queue| {
            for k in 1..=4 {
                assert_eq!(queue.pop(), Some(k));
            }
        });
        for k in 1..=4 {
            assert!(queue.push(k));
        }
        popper.join().unwrap();
    });
}

#[test]
fn segments_are_retired_when_nobody_uses_them() {
    bounded(3, || {
        let queue = Queue::new(Laps::chain(1), 4);
        let popper = spawn(&queue, 1, |queue| {
            for k in 1..=3 {
                assert_eq!(queue.pop(), Some(k));
            }
        });
        for k in 1..=3 {
            assert!(queue.push(k));
        }
        popper.join().unwrap();
        assert!(queue.ends.looks_empty());
    });
}

#[test]
fn segments_are_retired_under_two_pushers() {
    bounded(2, || {
        let queue = Queue::new(Laps::chain(1), 4);
        let popper = spawn(&queue, 1, |queue| {
            queue.pop().unwrap() + queue.pop().unwrap()
        });
        let pusher = spawn(&queue, 2, |queue| assert!(queue.push(1)));
        assert!(queue.push(2));
        pusher.join().unwrap();
        assert_eq!(popper.join().unwrap(), 3);
    });
}

/// The dead one has written its element, and not committed it.
#[test]
fn death_before_a_push_is_committed_leaves_the_place_free() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let mortal = spawn(&queue, 1, |queue| {
            let turn = queue.ends.push_turn(None).unwrap();
            if turn.has_room() {
                let place = turn.place(queue).unwrap();
                // SAFETY: loom's cell.
                queue.cell(place).with_mut(|at| unsafe { *at = 9 });
            }
            std::mem::forget(turn);
            die();
        });
        let popper = spawn(&queue, 2, |queue| queue.pop());
        assert!(queue.push(1));
        mortal.join().unwrap();
        assert_eq!(popper.join().unwrap(), Some(1));
    });
}

/// The dead one has committed, and neither freed the lock nor woken anybody.
#[test]
fn death_after_a_push_is_committed_wakes_the_popper() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(2), 1);
        let popper = spawn(&queue, 2, |queue| [queue.pop(), queue.pop()]);
        let mortal = spawn(&queue, 1, |queue| {
            let mut turn = queue.ends.push_turn(None).unwrap();
            let place = turn.place(queue).unwrap();
            // SAFETY: loom's cell.
            queue.cell(place).with_mut(|at| unsafe { *at = 9 });
            turn.commit(1);
            std::mem::forget(turn);
            die();
        });
        assert!(queue.push(1));
        mortal.join().unwrap();
        let popped = popper.join().unwrap();
        assert!(popped == [Some(9), Some(1)] || popped == [Some(1), Some(9)]);
    });
}

/// The dead one has freed the lock, and not woken the popper that sleeps.
#[test]
fn death_before_the_wake_wakes_the_popper() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let popper = spawn(&queue, 2, |queue| queue.pop());
        let mortal = spawn(&queue, 1, |queue| {
            let mut turn = queue.ends.push_turn(None).unwrap();
            let place = turn.place(queue).unwrap();
            // SAFETY: loom's cell.
            queue.cell(place).with_mut(|at| unsafe { *at = 9 });
            turn.commit(1);
            drop(turn);
            die();
        });
        mortal.join().unwrap();
        assert_eq!(popper.join().unwrap(), Some(9));
    });
}

/// The popper that dies has read the element, and not committed: it stays. Or it has, and wakes nobody.
#[test]
fn death_in_a_pop_loses_at_most_its_element() {
    for is_committed in [false, true] {
        bounded(3, move || {
            let queue = Queue::new(Laps::ring(1), 1);
            assert!(queue.push(1));
            let mortal = spawn(&queue, 1, move |queue| {
                let mut turn = queue.ends.pop_turn(None).unwrap();
                assert!(turn.has_item());
                // SAFETY: loom's cell.
                let value = queue.cell(turn.place(queue)).with(|at| unsafe { *at });
                assert_eq!(value, 1);
                if is_committed {
                    turn.commit(1);
                }
                std::mem::forget(turn);
                die();
            });
            let pusher = spawn(&queue, 2, |queue| assert!(queue.push(2)));
            mortal.join().unwrap();
            if !is_committed {
                assert_eq!(queue.pop(), Some(1));
            }
            assert_eq!(queue.pop(), Some(2));
            pusher.join().unwrap();
        });
    }
}

/// Of the steps between a full segment and the next: a new one is linked, and not entered.
#[test]
fn death_between_segments_lets_the_next_go_on() {
    bounded(3, || {
        let queue = Queue::new(Laps::chain(1), 4);
        assert!(queue.push(1));
        let mortal = spawn(&queue, 1, |queue| {
            let address = queue.allocated.fetch_add(1, Ordering::Relaxed) + 1;
            queue.ends.give_spare(address).unwrap();
            let turn = queue.ends.push_turn(None).unwrap();
            turn.place(queue).unwrap();
            std::mem::forget(turn);
            die();
        });
        let popper = spawn(&queue, 2, |queue| [queue.pop(), queue.pop()]);
        mortal.join().unwrap();
        assert!(queue.push(2));
        assert_eq!(popper.join().unwrap(), [Some(1), Some(2)]);
    });
}

/// Who is told that the queue is closed and empty, has missed nothing.
#[test]
fn nothing_is_pushed_after_a_popper_was_told_of_the_end() {
    bounded(3, || {
        let queue = Queue::new(Laps::chain(2), 2);
        let popper = spawn(&queue, 1, |queue| {
            let mut count = 0;
            while queue.pop().is_some() {
                count += 1;
            }
            count
        });
        let pusher = spawn(&queue, 2, |queue| {
            if queue.push(1) {
                queue.pushed.fetch_add(1, Ordering::Relaxed);
            }
        });
        queue.ends.close_if(CLOSED_BY_CALL, None, || true);
        pusher.join().unwrap();
        assert_eq!(popper.join().unwrap(), queue.pushed.load(Ordering::Relaxed));
    });
}

#[test]
fn close_wakes_a_pusher_that_waits_for_room() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(1), 1);
        assert!(queue.push(1));
        let pusher = spawn(&queue, 1, |queue| queue.push(2));
        queue.ends.close_if(CLOSED_BY_CALL, None, || true);
        assert!(!pusher.join().unwrap());
        assert_eq!([queue.pop(), queue.pop()], [Some(1), None]);
    });
}

/// The only producer dies or leaves, at any time: the popper gets what it has pushed, and ends.
#[test]
fn end_of_the_last_producer_ends_the_wait() {
    for dies in [false, true] {
        bounded(3, move || {
            let queue = Queue::new(Laps::ring(1), 1);
            let popper = spawn(&queue, 2, |queue| [queue.pop(), queue.pop()]);
            let producer = spawn(&queue, 1, move |queue| {
                let turn = queue.ends.push_turn(None);
                assert_eq!(enrolment::enrol(&queue.roll), Some(0));
                drop(turn);
                assert!(queue.push(5));
                if dies {
                    die();
                } else {
                    enrolment::leave(&queue.roll[0]);
                    queue.ends.wake_all();
                }
            });
            producer.join().unwrap();
            assert_eq!(popper.join().unwrap(), [Some(5), None]);
        });
    }
}

/// A new producer takes the place of a dead one, or finds the queue closed; never does it close with that one in it.
#[test]
fn place_is_taken_over_or_the_queue_closed() {
    bounded(3, || {
        let queue = Queue::new(Laps::ring(1), 1);
        let mortal = spawn(&queue, 1, |queue| {
            enrolment::enrol(&queue.roll).unwrap();
            die();
        });
        mortal.join().unwrap();
        let popper = spawn(&queue, 2, |queue| queue.pop());
        let next = spawn(&queue, 3, |queue| {
            let turn = queue.ends.push_turn(None);
            let is_in = queue.ends.closed() == 0 && enrolment::enrol(&queue.roll).is_some();
            drop(turn);
            is_in && {
                assert!(queue.push(7));
                true
            }
        });
        let is_in = next.join().unwrap();
        assert_eq!(popper.join().unwrap(), is_in.then_some(7));
    });
}

/// A mailbox of numbers.
struct Mailbox {
    words: Vec<AtomicU64>,
    arrived: [AtomicU64; 1],
    free: [AtomicU64; 1],
    next_number: AtomicU64,
    cells: Vec<UnsafeCell<u64>>,
    arrivals: WaitWord,
    room: WaitWord,
    closed: AtomicU32,
}

impl Mailbox {
    fn new(slots: usize) -> Arc<Mailbox> {
        let mailbox = Mailbox {
            words: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            arrived: [AtomicU64::new(0)],
            free: [AtomicU64::new(0)],
            next_number: AtomicU64::new(0),
            cells: (0..slots).map(|_| UnsafeCell::new(0)).collect(),
            arrivals: WaitWord::new(),
            room: WaitWord::new(),
            closed: AtomicU32::new(0),
        };
        mailbox.slots().hint_all_free();
        Arc::new(mailbox)
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            words: &self.words,
            arrived: &self.arrived,
            free: &self.free,
            next_number: &self.next_number,
        }
    }

    fn me() -> u64 {
        enrolment::word_of(Current.me())
    }

    /// Takes a slot, writes; `None` if the mailbox is closed.
    fn begin_to_send(&self, value: u64) -> Option<usize> {
        let slot = self.room.wait(&Current, None, None, || {
            let slot = self
                .slots()
                .claim(Mailbox::me())
                .or_else(|| self.slots().claim_sweeping(Mailbox::me()))?;
            if self.closed.load(Ordering::SeqCst) != 0 {
                self.slots().release(slot);
                self.arrivals.notify_one();
                return Some(None);
            }
            Some(Some(slot))
        });
        let slot = slot.unwrap()?;
        // SAFETY: loom's cell.
        self.cells[slot].with_mut(|at| unsafe { *at = value });
        Some(slot)
    }

    fn send(&self, value: u64) -> bool {
        let Some(slot) = self.begin_to_send(value) else {
            return false;
        };
        self.slots().publish(slot);
        self.arrivals.notify_one();
        true
    }

    /// All that have arrived, at least one; none if the mailbox is closed.
    fn recv(&self) -> Vec<(Arrived, u64)> {
        let mut found = Vec::new();
        self.arrivals
            .wait(&Current, None, None, || {
                self.slots().collect(|arrived| found.push(arrived));
                if found.is_empty() {
                    // As when a death is noticed, at each attempt.
                    let is_over =
                        self.closed.load(Ordering::SeqCst) != 0 && !self.slots().is_being_sent();
                    self.slots().sweep(|arrived| found.push(arrived));
                    return (is_over || !found.is_empty()).then_some(());
                }
                Some(())
            })
            .unwrap();
        found.sort();
        found.dedup();
        let read = |arrived: Arrived| {
            // SAFETY: loom's cell.
            let value = self.cells[arrived.slot].with(|at| unsafe { *at });
            (arrived, value)
        };
        found.into_iter().map(read).collect()
    }

    fn free(&self, arrived: Arrived) {
        self.slots().release(arrived.slot);
        self.room.notify_one();
    }

    /// Receives and frees so many.
    fn recv_values(&self, count: usize) -> Vec<u64> {
        let mut values = Vec::new();
        while values.len() < count {
            for (arrived, value) in self.recv() {
                values.push(value);
                self.free(arrived);
            }
        }
        values
    }
}

#[test]
fn messages_of_one_sender_arrive_in_order() {
    bounded(2, || {
        let mailbox = Mailbox::new(2);
        let sender = spawn(&mailbox, 1, |mailbox| {
            assert!((1..=3).all(|k| mailbox.send(k)));
        });
        assert_eq!(mailbox.recv_values(3), [1, 2, 3]);
        sender.join().unwrap();
    });
}

#[test]
fn two_senders_share_one_slot() {
    bounded(2, || {
        let mailbox = Mailbox::new(1);
        let senders = [1, 2].map(|k| {
            spawn(&mailbox, k, move |mailbox| {
                assert!(mailbox.send(u64::from(k)))
            })
        });
        assert_eq!(mailbox.recv_values(2).iter().sum::<u64>(), 3);
        for sender in senders {
            sender.join().unwrap();
        }
    });
}

/// The sender dies with the only slot: another one gets it.
#[test]
fn slot_of_a_dead_sender_is_used_again() {
    bounded(2, || {
        let mailbox = Mailbox::new(1);
        let mortal = spawn(&mailbox, 1, |mailbox| {
            mailbox.begin_to_send(9).unwrap();
            die();
        });
        let sender = spawn(&mailbox, 2, |mailbox| assert!(mailbox.send(1)));
        assert_eq!(mailbox.recv_values(1), [1]);
        mortal.join().unwrap();
        sender.join().unwrap();
    });
}

/// It dies with the hint of the only slot, and not the slot.
#[test]
fn slot_whose_hint_a_dead_one_took_is_found() {
    bounded(2, || {
        let mailbox = Mailbox::new(1);
        let mortal = spawn(&mailbox, 1, |mailbox| {
            mailbox.free[0].fetch_and(0, Ordering::SeqCst);
            die();
        });
        let sender = spawn(&mailbox, 2, |mailbox| assert!(mailbox.send(1)));
        assert_eq!(mailbox.recv_values(1), [1]);
        mortal.join().unwrap();
        sender.join().unwrap();
    });
}

/// It dies with the message committed, and nobody told.
#[test]
fn message_of_a_dead_sender_is_found() {
    bounded(3, || {
        let mailbox = Mailbox::new(2);
        let mortal = spawn(&mailbox, 1, |mailbox| {
            let slot = mailbox.begin_to_send(9).unwrap();
            let word = &mailbox.words[slot];
            // As `publish` does up to the commit: full, with a number.
            mailbox.next_number.fetch_add(1, Ordering::SeqCst);
            word.store(1 << 31, Ordering::SeqCst);
            die();
        });
        assert_eq!(mailbox.recv_values(1), [9]);
        mortal.join().unwrap();
    });
}

/// The receiver dies while it drops a message: the slot is free for the next sender.
#[test]
fn slot_of_a_dead_receiver_is_used_again() {
    bounded(3, || {
        let mailbox = Mailbox::new(1);
        assert!(mailbox.send(1));
        let mortal = spawn(&mailbox, 1, |mailbox| {
            let (arrived, value) = mailbox.recv()[0];
            assert_eq!(value, 1);
            mailbox.slots().retract(arrived, Mailbox::me());
            // SAFETY: loom's cell.
            mailbox.cells[arrived.slot].with_mut(|at| unsafe { *at = 0 });
            die();
        });
        let sender = spawn(&mailbox, 2, |mailbox| assert!(mailbox.send(2)));
        mortal.join().unwrap();
        assert_eq!(mailbox.recv_values(1), [2]);
        sender.join().unwrap();
    });
}

#[test]
fn nothing_arrives_after_the_receiver_was_told_of_the_end() {
    bounded(2, || {
        let mailbox = Mailbox::new(1);
        let sender = spawn(&mailbox, 1, |mailbox| mailbox.send(1));
        let closer = spawn(&mailbox, 2, |mailbox| {
            mailbox.closed.store(1, Ordering::SeqCst);
            mailbox.arrivals.notify_all();
            mailbox.room.notify_all();
        });
        let mut count = 0;
        loop {
            let found = mailbox.recv();
            if found.is_empty() {
                break;
            }
            for (arrived, _) in found {
                count += 1;
                mailbox.free(arrived);
            }
        }
        closer.join().unwrap();
        assert_eq!(count, u32::from(sender.join().unwrap()));
    });
}

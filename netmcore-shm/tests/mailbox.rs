//! Guards against messages that are lost, doubled or read after they were freed when senders and receivers are killed, and against waiting for the dead.
//!
//! # Safety
//!
//! The counters are a page of zeros, mapped as long as the test runs, and used as atomics only.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::{
    AnonRegion, Arena, ClosedBy, EnrolError, Error, Heap, Mailbox, RecvError, SendError, ShmArc,
    ShmSafe,
};
use netmcore_sys::crash;
use netmcore_sys::process::{self, Forked, PidFd};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use support::{Random, assert_times_out, fork};

/// A death is noticed within this on an idle machine; tests allow for a busy one.
const SOON: Duration = Duration::from_secs(10);

struct World {
    arena: Arena,
    heap: Heap,
    page: AnonRegion,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let page = AnonRegion::create(c"counters", &arena, 4096).unwrap();
        World { arena, heap, page }
    }

    /// Words of zeros that all processes of the test share.
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: a page of zeros, mapped as long as the world, used as atomics only.
        unsafe { std::slice::from_raw_parts(self.page.at().cast(), 4096 / 8) }
    }

    fn mailbox<T: ShmSafe>(&self, slots: usize) -> ShmArc<Mailbox<T>> {
        ShmArc::new_in(&self.heap, Mailbox::new_in(&self.heap, slots).unwrap()).unwrap()
    }

    fn noisy(&self, payload: u64) -> Noisy {
        Noisy {
            payload,
            drops_at: self.page.at().addr(),
        }
    }
}

const BOMB: u64 = 666;

/// Counts its drops, in whichever process; that of a bomb panics.
#[derive(Debug, ShmSafe)]
struct Noisy {
    payload: u64,
    drops_at: usize,
}

impl Drop for Noisy {
    fn drop(&mut self) {
        assert!(self.payload != u64::MAX, "dropped twice");
        let payload = std::mem::replace(&mut self.payload, u64::MAX);
        // SAFETY: the page outlives the heap's values in these tests.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.drops_at) }
            .fetch_add(1, SeqCst);
        assert!(payload != BOMB, "as planned");
    }
}

fn messages_are_read_in_place_and_freed_in_any_order() {
    let world = World::new();
    // More than the hints of one word.
    let mailbox = world.mailbox::<u64>(100);
    let receiver = mailbox.receiver().unwrap();
    assert_eq!(mailbox.capacity(), 100);
    for lap in 0..3 {
        for k in 0..100 {
            assert_eq!(mailbox.len(), k as usize);
            mailbox.try_send(lap * 100 + k).unwrap();
        }
        match mailbox.try_send(7) {
            Err(error @ SendError::Full { .. }) => assert_eq!(error.into_value(), 7),
            other => panic!("{other:?}"),
        }
        let first = receiver.recv().unwrap();
        assert_eq!((*first, first.number()), (lap * 100, lap * 100));
        let mut rest: Vec<_> = receiver.arrived();
        assert!(
            rest.iter()
                .enumerate()
                .all(|(k, message)| **message == lap * 100 + k as u64 + 1)
        );
        assert!(matches!(receiver.try_recv(), Err(RecvError::Empty)));
        // The middle first.
        drop(rest.remove(50));
        assert_eq!(mailbox.len(), 99);
        rest.pop().unwrap().put_back();
        rest.remove(3).put_back();
        let again = receiver.arrived();
        assert_eq!(*again[0], lap * 100 + 4);
        assert_eq!(*again[1], lap * 100 + 99);
        assert_eq!((first.take(), again.len()), (lap * 100, 2));
    }
    assert!(mailbox.is_empty());
}

fn large_messages_are_made_in_place() {
    const LEN: usize = 64 << 10;
    let world = World::new();
    let mailbox = world.mailbox::<[u8; LEN]>(2);
    let child = fork(|| {
        for k in 1..=20 {
            mailbox
                .send_with(|slot| {
                    // SAFETY: all bytes are written.
                    unsafe {
                        slot.as_mut_ptr().write_bytes(k, 1);
                        slot.assume_init_mut()
                    }
                })
                .unwrap();
        }
    });
    let receiver = mailbox.receiver().unwrap();
    for k in 1..=20 {
        assert!(receiver.recv().unwrap().iter().all(|&byte| byte == k));
    }
    assert!(child.ended_well());
    // What is not made in the slot, or not at all, is not sent.
    let sent = catch_unwind(AssertUnwindSafe(|| {
        mailbox.send_with(|_| Box::leak(Box::new([0; LEN]))).is_ok()
    }));
    assert!(sent.is_err());
    let sent = catch_unwind(AssertUnwindSafe(|| {
        mailbox.send_with(|_| panic!("as planned")).is_ok()
    }));
    assert!(sent.is_err());
    assert!(mailbox.is_empty());
    assert!((0..2).all(|_| mailbox.try_send([1; LEN]).is_ok()));
    assert!(mailbox.try_send_with(|slot| slot.write([2; LEN])).is_err());
    let soon = Instant::now() + Duration::from_millis(20);
    let sent = mailbox.send_with_deadline(|slot| slot.write([2; LEN]), soon);
    assert!(matches!(sent, Err(SendError::TimedOut { .. })) && Instant::now() >= soon);
}

fn messages_are_dropped_once_and_memory_comes_back() {
    let world = World::new();
    drop(ShmArc::new_in(&world.heap, 0_u8).unwrap());
    let blocks = world.heap.stats().in_use_blocks;
    let drops = &world.words()[0];
    let mailbox = world.mailbox(20);
    mailbox.senders(4).unwrap();
    for k in 0..20 {
        mailbox.send(world.noisy(k)).unwrap();
    }
    let receiver = mailbox.receiver().unwrap();
    for k in 0..10 {
        let message = receiver.recv().unwrap();
        assert_eq!(drops.load(SeqCst), k);
        if k % 2 == 0 {
            drop(message);
        } else {
            assert_eq!(message.take().payload, k);
        }
    }
    assert_eq!((drops.load(SeqCst), mailbox.len()), (10, 10));
    // A message that panics when it is dropped, by the receiver and with the mailbox.
    mailbox.send(world.noisy(BOMB)).unwrap();
    let mut arrived = receiver.arrived();
    let last = arrived.remove(10);
    assert_eq!(last.payload, BOMB);
    arrived.into_iter().for_each(|message| message.put_back());
    assert!(catch_unwind(AssertUnwindSafe(|| drop(last))).is_err());
    assert_eq!((drops.load(SeqCst), mailbox.len()), (11, 10));
    drop(receiver);
    let mailbox = ShmArc::try_unwrap(mailbox).ok().unwrap();
    let again = world.mailbox(4);
    drop(mailbox);
    assert_eq!(drops.load(SeqCst), 21);
    for k in [1, 2, BOMB, 3] {
        again.send(world.noisy(k)).unwrap();
    }
    let again = ShmArc::try_unwrap(again).ok().unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| drop(again))).is_err());
    assert_eq!(drops.load(SeqCst), 25);
    world.heap.verify().unwrap();
    assert_eq!(world.heap.stats().in_use_blocks, blocks);
}

fn foreign_pointers_give_the_message_back() {
    let world = World::new();
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    let mailbox = ShmArc::new_in(&other, Mailbox::new_in(&other, 2).unwrap()).unwrap();
    let foreign = ShmArc::new_in(&world.heap, 5_u32).unwrap();
    match mailbox.send(foreign.clone()) {
        Err(SendError::Refused {
            value,
            error: Error::ForeignPointer { .. },
        }) => assert_eq!(*value, 5),
        other => panic!("{other:?}"),
    }
    let sent = mailbox.send_with(|slot| slot.write(foreign.clone()));
    assert!(matches!(sent, Err(SendError::Refused { .. })));
    assert_eq!((mailbox.len(), ShmArc::strong_count(&foreign)), (0, 1));
    let ours = ShmArc::new_in(&other, 6_u32).unwrap();
    mailbox.send(ours.clone()).unwrap();
    mailbox.send(ours.clone()).unwrap();
    assert!(mailbox.try_send(ours.clone()).unwrap_err().is_full());
    assert_eq!(ShmArc::strong_count(&ours), 3);
    drop(mailbox);
    assert_eq!(ShmArc::strong_count(&ours), 1);
}

fn one_receives_at_a_time() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(4);
    let receiver = mailbox.receiver().unwrap();
    let text = mailbox.receiver().unwrap_err().to_string();
    assert!(text.contains("is the receiver"), "{text}");
    assert!(fork(|| assert!(mailbox.receiver().is_err())).ended_well());
    let child = fork(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(mailbox.receiver().is_err()));
        });
    });
    assert!(child.ended_well());
    mailbox.send(1).unwrap();
    // A forked copy is not the receiver, and its end is nothing.
    let copy = fork(|| {
        // SAFETY: what this process, a copy, does not use any more.
        let copy = unsafe { std::ptr::read(&raw const receiver) };
        assert!(catch_unwind(AssertUnwindSafe(|| copy.try_recv().is_ok())).is_err());
        drop(copy);
    });
    assert!(copy.ended_well());
    let reading = receiver.recv().unwrap();
    // Handed over with a message that was read, and put back by nobody.
    std::mem::forget(reading);
    receiver.hand_over();
    mailbox.send(2).unwrap();
    let child = fork(|| {
        let receiver = mailbox.receiver().unwrap();
        assert_eq!(receiver.recv().unwrap().take(), 1);
        assert_eq!(receiver.recv().unwrap().take(), 2);
    });
    assert!(child.ended_well());
    // It has ended: senders are told, until there is a new one.
    match mailbox.send(3) {
        Err(SendError::Closed { value: 3, closed }) => {
            assert_eq!(closed.by, ClosedBy::ConsumersGone);
        }
        other => panic!("{other:?}"),
    }
    let receiver = mailbox.receiver().unwrap();
    mailbox.send(4).unwrap();
    assert_eq!(receiver.recv().unwrap().take(), 4);
}

fn death_of_the_receiver_is_told_and_its_messages_go_to_the_next() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(3);
    let ready = &world.words()[0];
    let mortal = fork(|| {
        let receiver = mailbox.receiver().unwrap();
        let _reading = receiver.recv().unwrap();
        ready.store(1, SeqCst);
        loop {
            std::thread::park();
        }
    });
    (1..=3).for_each(|k| mailbox.send(k).unwrap());
    while ready.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let blocked = fork(|| match mailbox.send(4) {
        Err(SendError::ReceiverDied { value: 4, owner }) => {
            assert!(owner.to_string().starts_with("owner"));
        }
        other => panic!("{other:?}"),
    });
    // sleep: it should be asleep by then; the test holds if it is not.
    std::thread::sleep(Duration::from_millis(20));
    mortal.kill();
    let killed = Instant::now();
    assert!(!mortal.ended_well() && blocked.ended_well());
    assert!(killed.elapsed() < SOON);
    assert!(matches!(
        mailbox.try_send(5),
        Err(SendError::ReceiverDied { .. })
    ));
    let receiver = mailbox.receiver().unwrap();
    let all: Vec<_> = receiver.arrived().into_iter().map(|m| m.take()).collect();
    assert_eq!(all, [1, 2, 3]);
    mailbox.send(6).unwrap();
    assert_eq!(receiver.recv().unwrap().take(), 6);
}

fn senders_that_leave_or_die_close_the_mailbox() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(8);
    assert!(matches!(mailbox.sender(), Err(EnrolError::NotTold)));
    mailbox.senders(2).unwrap();
    assert!(matches!(
        mailbox.senders(3),
        Err(EnrolError::ToldOtherwise { .. })
    ));
    let ready = &world.words()[0];
    let mortal = fork(|| {
        let sender = mailbox.sender().unwrap();
        sender.send(1).unwrap();
        ready.store(1, SeqCst);
        loop {
            std::thread::park();
        }
    });
    while ready.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let waiting = fork(|| {
        let receiver = mailbox.receiver().unwrap();
        let mut sum = 0;
        let closed = loop {
            match receiver.recv() {
                Ok(message) => sum += *message,
                Err(RecvError::Closed(closed)) => break closed,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(sum, 3);
        assert_eq!(closed.by, ClosedBy::ProducersGone);
        assert_eq!((closed.ended_count, closed.died.len()), (1, 1));
        assert!(receiver.try_recv().unwrap_err().is_closed());
        assert!(receiver.recv_many(2).unwrap_err().is_closed());
    });
    mailbox.sender().unwrap().send(2).unwrap();
    mortal.kill();
    let killed = Instant::now();
    assert!(!mortal.ended_well() && waiting.ended_well());
    assert!(killed.elapsed() < SOON);
    assert!(matches!(mailbox.sender(), Err(EnrolError::Closed(_))));
}

fn close_and_deadlines_end_waits() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(2);
    let receiver = mailbox.receiver().unwrap();
    let wait = Duration::from_millis(30);
    assert_times_out(wait, |deadline| match receiver.recv_deadline(deadline) {
        Err(RecvError::TimedOut { waited }) => waited,
        other => panic!("{other:?}"),
    });
    mailbox.send(1).unwrap();
    let timed_out = receiver.recv_many_deadline(2, Instant::now() + wait);
    assert!(matches!(timed_out, Err(RecvError::TimedOut { .. })));
    mailbox.send(2).unwrap();
    assert_times_out(wait, |deadline| match mailbox.send_deadline(3, deadline) {
        Err(SendError::TimedOut { value: 3, waited }) => waited,
        other => panic!("{other:?}"),
    });
    let reading = receiver.recv_many(2).unwrap();
    assert_eq!(reading.iter().map(|message| **message).sum::<u64>(), 3);
    let too_many = catch_unwind(AssertUnwindSafe(|| receiver.recv_many(1).is_ok()));
    assert!(too_many.is_err(), "both slots are being read");
    let too_many = catch_unwind(AssertUnwindSafe(|| receiver.recv_many(usize::MAX).is_ok()));
    assert!(too_many.is_err());
    let blocked = fork(|| assert!(matches!(mailbox.send(4), Err(SendError::Closed { .. }))));
    // sleep: it should be asleep by then; the test holds if it is not.
    std::thread::sleep(Duration::from_millis(20));
    mailbox.close();
    assert!(blocked.ended_well());
    drop(reading);
    assert!(receiver.recv().unwrap_err().is_closed());
    assert!(matches!(mailbox.try_send(5), Err(SendError::Closed { .. })));
}

/// Two senders die, each with a slot; between the deaths somebody finds a free one and so does not miss the first.
fn slots_of_the_dead_come_back_to_those_who_do_not_wait() {
    let world = World::new();
    // A supervisor: without one it is looked for the dead again and again.
    let people: &support::World = Box::leak(Box::new(support::World::new(1 << 20)));
    let be = |index| {
        let person = Box::leak(Box::new(people.person(index, 1)));
        // SAFETY: each process has an index of its own, and has one thread.
        unsafe { netmcore_sem::current::install(person) };
        person.id
    };
    let me = be(0);
    let mailbox = world.mailbox::<u64>(3);
    for index in 1..=2 {
        crash::arm_role(1, 2);
        let mortal = fork(|| {
            crash::set_role(1);
            be(index);
            mailbox.send(9).unwrap();
        });
        assert!(!mortal.ended_well());
        assert_eq!(crash::died_at().as_deref(), Some("shm.mailbox.claimed"));
        crash::disarm();
        people.settle_death(netmcore_shm::OwnerId { index, ..me });
        mailbox.try_send(u64::from(index)).unwrap();
    }
    mailbox.try_send(3).unwrap();
    assert!(mailbox.try_send(4).unwrap_err().is_full());
    let receiver = mailbox.receiver().unwrap();
    assert_eq!(receiver.arrived().len(), 3);
}

/// A copy of a process that just makes a message neither sends it nor gives its slot away.
fn fork_while_a_message_is_made_leaves_the_slot_alone() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(1);
    let mut is_copy = false;
    let sent = catch_unwind(AssertUnwindSafe(|| {
        mailbox.send_with(|slot| {
            // SAFETY: there is one thread; the child leaves by `exit_now`.
            match unsafe { process::fork() }.unwrap() {
                Forked::Child => {
                    is_copy = true;
                    panic!("as planned");
                }
                Forked::Parent(pid) => drop(PidFd::open(pid).unwrap().wait().unwrap()),
            }
            assert!(mailbox.try_send(9).unwrap_err().is_full());
            slot.write(1)
        })
    }));
    if is_copy {
        process::exit_now(0);
    }
    assert!(matches!(sent, Ok(Ok(()))));
    assert_eq!(*mailbox.receiver().unwrap().recv().unwrap(), 1);
}

fn descriptor_finds_the_mailbox() {
    let world = World::new();
    let mailbox = Mailbox::<u64, _>::with_header_in(&world.heap, 2, [4_u8; 4]).unwrap();
    let mailbox = ShmArc::new_in(&world.heap, mailbox).unwrap();
    let text = serde_json::to_string(&mailbox).unwrap();
    let child = fork(|| {
        let mailbox: ShmArc<Mailbox<u64, [u8; 4]>> = serde_json::from_str(&text).unwrap();
        mailbox.send(u64::from(mailbox.header()[3])).unwrap();
    });
    assert!(child.ended_well());
    assert_eq!(*mailbox.receiver().unwrap().recv().unwrap(), 4);
    let text = format!("{mailbox:?}");
    assert!(text.contains("capacity: 2"), "{text}");
    // In private memory it is not for forked children.
    let private = Mailbox::<u8>::new_in(&world.heap, 1).unwrap();
    let child = fork(|| {
        assert!(catch_unwind(AssertUnwindSafe(|| private.send(1).is_ok())).is_err());
    });
    assert!(child.ended_well());
}

/// What a mortal does below: everything, so that each crash point is passed.
fn everything(world: &World, mailbox: &Mailbox<[u64; 3]>, noisy: &Mailbox<Noisy>) {
    noisy.try_send(world.noisy(1)).unwrap();
    let receiver = noisy.receiver().unwrap();
    drop(receiver.recv().unwrap());
    let other = Mailbox::<u8>::new_in(&world.heap, 1).unwrap();
    other.close();
    drop((receiver, other));

    let sender = mailbox.sender().unwrap();
    sender.try_send_with(|slot| slot.write([2_000; 3])).unwrap();
    sender.try_send([1_000; 3]).unwrap();
    assert!(sender.try_send([1_001; 3]).is_err());
    let receiver = mailbox.receiver().unwrap();
    if let Ok(message) = receiver.try_recv() {
        assert_eq!(message[0], message[2]);
        message.take();
    }
    drop(receiver.try_recv());
    receiver.hand_over();
    drop(mailbox.receiver().unwrap());
}

fn crash_at_any_point_leaves_the_others_well() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let (mailbox, noisy) = (world.mailbox(3), world.mailbox(1));
        mailbox.senders(2).unwrap();
        mailbox.send([7; 3]).unwrap();
        crash::arm(Some(k));
        let ended_well = fork(|| everything(&world, &mailbox, &noisy)).ended_well();
        crash::disarm();
        let at = crash::died_at();
        let began = Instant::now();
        // Somebody receives; senders were told of the death, or of the end, until then.
        let receiver = mailbox.receiver().unwrap();
        let there = receiver.arrived();
        assert!(there.iter().all(|m| m[0] == m[1] && m[1] == m[2]), "{at:?}");
        let numbers: Vec<_> = there.iter().map(|m| m.number()).collect();
        assert!(numbers.is_sorted(), "{at:?}");
        assert_eq!(there.len(), mailbox.len());
        drop(there);
        // All slots are there, also those that the dead one had.
        for lap in 0..3 {
            for k in 0..3 {
                mailbox.send([lap * 3 + k; 3]).unwrap();
            }
            assert!(mailbox.try_send([99; 3]).is_err());
            for k in 0..3 {
                assert_eq!(receiver.recv().unwrap()[1], lap * 3 + k, "{at:?}");
            }
        }
        let noisy_receiver = noisy.receiver().unwrap();
        let left = noisy_receiver.arrived().len() as u64;
        noisy.send(world.noisy(2)).unwrap();
        assert_eq!(noisy_receiver.recv().unwrap().payload, 2);
        // That of the child was dropped, never sent, or half-dropped.
        assert!(left <= 1 && world.words()[0].load(SeqCst) <= 2, "{at:?}");
        assert!(began.elapsed() < SOON);
        // One enrolls, and perhaps takes a dead one's place; the mailbox closes when all are gone.
        let first = mailbox.sender().unwrap();
        let second = mailbox.sender();
        assert!(
            second.is_ok() != (ended_well || at.as_deref() == Some("shm.mailbox.left")),
            "{at:?}"
        );
        drop((first, second));
        assert!(receiver.recv().unwrap_err().is_closed(), "{at:?}");
        world.heap.verify().unwrap();
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for step in [
        "mailbox.made",
        "mailbox.hint_taken",
        "mailbox.claimed",
        "mailbox.written",
        "mailbox.written_in_place",
        "mailbox.numbered",
        "mailbox.sent",
        "mailbox.sent_before_wake",
        "mailbox.hints_taken",
        "mailbox.copied",
        "mailbox.freed",
        "mailbox.freed_before_wake",
        "mailbox.retracted",
        "mailbox.dropped",
        "mailbox.receiver_taken",
        "mailbox.handed_over",
        "mailbox.receiver_ended",
        "mailbox.enrolled",
        "mailbox.left",
        "mailbox.closed_before_wake",
    ] {
        let name = format!("shm.{step}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

/// Senders and the receiver are killed at random: each message is received once, in its sender's order; but one for each that was killed.
fn random_kills_lose_nothing() {
    const SENDERS: usize = 3;
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(60);
    let world = World::new();
    let mailbox = world.mailbox::<[u64; 2]>(5);
    // One for each message that was taken: its number, its sender. In a mailbox that is large enough.
    let received = world.mailbox::<[u64; 2]>(200_000);
    let words = world.words();
    let (begun, stop) = (&words[..SENDERS], &words[SENDERS]);
    let sender = |me: usize| {
        let (mailbox, begun) = (&mailbox, &begun[me]);
        fork(move || {
            loop {
                let number = begun.fetch_add(1, SeqCst);
                let mut message = [number, me as u64];
                loop {
                    match mailbox.send(message) {
                        Ok(()) => break,
                        // The next one comes soon.
                        Err(error @ SendError::ReceiverDied { .. }) => {
                            message = error.into_value();
                            std::thread::yield_now();
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                if stop.load(SeqCst) != 0 || number > 50_000 {
                    return;
                }
            }
        })
    };
    let receiver = || {
        let (mailbox, received) = (&mailbox, &received);
        fork(move || {
            let receiver = mailbox.receiver().unwrap();
            loop {
                match receiver.recv() {
                    Ok(message) => received.send(message.take()).unwrap(),
                    Err(error) => {
                        assert!(error.is_closed());
                        break;
                    }
                }
            }
            receiver.hand_over();
        })
    };
    let mut senders: Vec<_> = (0..SENDERS).map(sender).collect();
    let mut receiving = receiver();
    for _ in 0..kills {
        // sleep: to be killed at a random moment.
        std::thread::sleep(Duration::from_micros(random.below(3_000)));
        let victim = random.below(SENDERS as u64 + 1) as usize;
        if victim < SENDERS {
            senders[victim].kill();
            // It may have sent all that it had to.
            senders[victim].ended_well();
            senders[victim] = sender(victim);
        } else {
            receiving.kill();
            assert!(!receiving.ended_well());
            receiving = receiver();
        }
    }
    stop.store(1, SeqCst);
    assert!(senders.iter().all(support::Child::ended_well));
    mailbox.close();
    assert!(receiving.ended_well());
    assert!(mailbox.is_empty());
    let mut seen: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let receiver = received.receiver().unwrap();
    for message in receiver.arrived() {
        seen.entry(message[1]).or_default().push(message[0]);
    }
    let mut missing = 0;
    for (of, numbers) in &seen {
        assert!(numbers.is_sorted_by(|a, b| a < b), "twice, or out of order");
        missing += begun[*of as usize].load(SeqCst) - numbers.len() as u64;
    }
    assert!(missing <= kills, "{missing} of {kills}");
    world.heap.verify().unwrap();
}

/// A receiver that sleeps, and senders that wait for room, in threads.
fn threads_pass_everything_once() {
    let world = World::new();
    let mailbox = world.mailbox::<u64>(3);
    const EACH: u64 = 3_000;
    let senders = fork(|| {
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (1..=EACH).for_each(|k| mailbox.send(k).unwrap()));
            }
        });
    });
    let receiver = mailbox.receiver().unwrap();
    let mut sum = 0;
    for _ in 0..3 * EACH {
        sum += *receiver.recv().unwrap();
    }
    assert!(senders.ended_well());
    assert_eq!(sum, 3 * EACH * (EACH + 1) / 2);
    assert!(mailbox.is_empty());
}

/// Another thread may read the message after that of the receiver has ended.
fn leaked_receiver_receives_until_its_process_is_dead() {
    let world = World::new();
    let mailbox = Mailbox::<u64>::new_in(&world.heap, 2).unwrap();
    let mailbox = ShmArc::new_in(&world.heap, mailbox).unwrap();
    mailbox.send(5).unwrap();
    let child = fork(|| {
        let message: &u64 = support::leak_in_a_thread(|| {
            let receiver = Box::leak(Box::new(mailbox.receiver().unwrap()));
            &**Box::leak(Box::new(receiver.recv().unwrap()))
        });
        assert!(mailbox.receiver().is_err());
        assert_eq!(*message, 5);
    });
    assert!(child.ended_well());
    // One that hands over has leaked nothing, and its thread ends.
    let hands_over = || mailbox.receiver().unwrap().hand_over();
    std::thread::scope(|scope| scope.spawn(hands_over).join()).unwrap();
    drop(mailbox.receiver().unwrap());
}

netmcore_forktest::forktests!(
    messages_are_read_in_place_and_freed_in_any_order,
    large_messages_are_made_in_place,
    messages_are_dropped_once_and_memory_comes_back,
    foreign_pointers_give_the_message_back,
    one_receives_at_a_time,
    leaked_receiver_receives_until_its_process_is_dead,
    death_of_the_receiver_is_told_and_its_messages_go_to_the_next,
    senders_that_leave_or_die_close_the_mailbox,
    close_and_deadlines_end_waits,
    slots_of_the_dead_come_back_to_those_who_do_not_wait,
    fork_while_a_message_is_made_leaves_the_slot_alone,
    descriptor_finds_the_mailbox,
    crash_at_any_point_leaves_the_others_well,
    random_kills_lose_nothing,
    threads_pass_everything_once,
);

//! Guards against shared values that are dropped twice, never, or while somebody uses them, and against waiting for a dead initialiser.
//!
//! # Safety
//!
//! The counter page is mapped as long as the test runs, and holds an atomic.

#![allow(unsafe_code)]

mod support;

use netmcore_sem::ShmMutex;
use netmcore_shm::{
    AnonRegion, Arena, Descriptor, Error, Heap, Region, RegionId, Resolver, RootState, SentHandle,
    ShmArc, ShmSafe, install_resolver,
};
use netmcore_sys::crash;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use support::{Random, fork};

/// A heap, and a counter of drops.
struct World {
    arena: Arena,
    heap: Heap,
    page: AnonRegion,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let page = AnonRegion::create(c"drops", &arena, 4096).unwrap();
        World { arena, heap, page }
    }

    fn drops(&self) -> &AtomicU64 {
        // SAFETY: a page of zeros, mapped as long as the world, used as this atomic only.
        unsafe { &*self.page.at().cast::<AtomicU64>() }
    }

    fn noisy(&self, payload: u64) -> Noisy {
        Noisy {
            payload,
            drops_at: self.page.at().addr(),
            count: AtomicU64::new(0),
        }
    }
}

/// Counts its drops, in whichever process.
#[derive(Debug, ShmSafe)]
struct Noisy {
    payload: u64,
    drops_at: usize,
    count: AtomicU64,
}

impl Drop for Noisy {
    fn drop(&mut self) {
        assert!(
            self.payload < 1_000_000,
            "dropped twice, or before it was made"
        );
        self.payload = u64::MAX;
        // SAFETY: the page outlives the heap's values in these tests.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.drops_at) }
            .fetch_add(1, SeqCst);
    }
}

fn handles_count_and_the_last_drops() {
    let world = World::new();
    let first = ShmArc::new_in(&world.heap, world.noisy(5)).unwrap();
    let second = first.clone();
    assert!(ShmArc::ptr_eq(&first, &second));
    assert_eq!((ShmArc::strong_count(&first), second.payload), (2, 5));
    assert!(
        world
            .heap
            .allocator()
            .contains(ShmArc::as_ptr(&first).cast())
    );
    let second = ShmArc::try_unwrap(second).err().unwrap();
    drop(first);
    assert_eq!(world.drops().load(SeqCst), 0);
    let value = ShmArc::try_unwrap(second).ok().unwrap();
    assert_eq!(world.drops().load(SeqCst), 0);
    drop(value);
    assert_eq!(world.drops().load(SeqCst), 1);
    assert!(world.heap.shared_values().unwrap().is_empty());
    // Many more than a chunk of roots, at the same time; all their blocks come back.
    let mut blocks = 0;
    for _ in 0..3 {
        let many: Vec<_> = (0..1_000)
            .map(|k| ShmArc::new_in(&world.heap, world.noisy(k)).unwrap())
            .collect();
        assert!(
            many.iter()
                .enumerate()
                .all(|(k, arc)| arc.payload == k as u64)
        );
        assert_eq!(world.heap.shared_values().unwrap().len(), 1_000);
        drop(many);
        let in_use = world.heap.stats().in_use_blocks;
        assert!(
            blocks == 0 || blocks == in_use,
            "the table grows for nothing"
        );
        blocks = in_use;
    }
    assert_eq!(world.drops().load(SeqCst), 3_001);
    // 64 + 128 + 256 + 512 + 1024 roots, and the directory.
    assert!(blocks <= 6, "{blocks}");
    world.heap.verify().unwrap();
}

fn get_mut_makes_descriptors_void() {
    let world = World::new();
    let mut arc = ShmArc::new_in(&world.heap, world.noisy(1)).unwrap();
    let descriptor = ShmArc::descriptor(&arc).unwrap();
    let other = descriptor.resolve().unwrap();
    assert!(ShmArc::get_mut(&mut arc).is_none());
    drop(other);
    ShmArc::get_mut(&mut arc).unwrap().payload = 2;
    assert!(matches!(descriptor.resolve(), Err(Error::Gone { .. })));
    assert_eq!(
        ShmArc::descriptor(&arc).unwrap().resolve().unwrap().payload,
        2
    );
}

/// Through a pipe of text, both ways: the child's new value comes to the parent, as the parent's to the child.
fn descriptors_work_in_forked_children() {
    let world = World::new();
    let arc = ShmArc::new_in(&world.heap, world.noisy(7)).unwrap();
    let text = serde_json::to_string(&(arc.clone(), ShmArc::descriptor(&arc).unwrap())).unwrap();
    let answer = ShmArc::new_in(&world.heap, [const { AtomicU64::new(0) }; 64]).unwrap();
    let child = fork(|| {
        let (theirs, descriptor): (ShmArc<Noisy>, Descriptor<Noisy>) =
            serde_json::from_str(&text).unwrap();
        assert_eq!(ShmArc::strong_count(&theirs), 2);
        theirs.count.store(70, SeqCst);
        assert!(ShmArc::ptr_eq(&theirs, &descriptor.resolve().unwrap()));
        let own = ShmArc::new_in(&world.heap, world.noisy(8)).unwrap();
        let text = serde_json::to_vec(&own).unwrap();
        for (place, word) in answer.iter().zip(text.chunks(8)) {
            let mut bytes = [b' '; 8];
            bytes[..word.len()].copy_from_slice(word);
            place.store(u64::from_ne_bytes(bytes), SeqCst);
        }
        ShmArc::keep(own);
    });
    assert!(child.ended_well());
    assert_eq!(arc.count.load(SeqCst), 70);
    assert_eq!(
        ShmArc::strong_count(&arc),
        1,
        "the child's handles are gone"
    );
    let text: Vec<u8> = answer
        .iter()
        .flat_map(|word| word.load(SeqCst).to_ne_bytes())
        .take_while(|&byte| byte != 0)
        .collect();
    let theirs: ShmArc<Noisy> = serde_json::from_slice(&text).unwrap();
    assert_eq!((theirs.payload, ShmArc::strong_count(&theirs)), (8, 2));
}

/// Lets messages have handles, as a supervisor does: this thread sends and receives.
struct Courier;

thread_local! {
    static SENT: RefCell<Vec<SentHandle>> = const { RefCell::new(Vec::new()) };
}

impl Resolver for Courier {
    fn attach(&self, id: RegionId) -> netmcore_shm::Result<Region> {
        Err(Error::NoRegion { id })
    }

    fn is_sent(&self, _: RegionId, handle: &dyn Fn() -> SentHandle) {
        SENT.with_borrow_mut(|sent| sent.push(handle()));
    }

    fn is_receiving(&self) -> bool {
        true
    }
}

fn send(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_string(value).unwrap();
    SENT.take().into_iter().for_each(SentHandle::leave);
    text
}

fn receive(text: &str) -> Result<ShmArc<Noisy>, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn handles_travel_in_messages() {
    install_resolver(&Courier);
    let world = World::new();
    let drops = || world.drops().load(SeqCst);
    let count = |arc: &ShmArc<Noisy>| ShmArc::strong_count(arc);

    // The message alone keeps it.
    let message = send(&ShmArc::new_in(&world.heap, world.noisy(1)).unwrap());
    assert_eq!(drops(), 0);
    let mut arrived = receive(&message).unwrap();
    assert_eq!((count(&arrived), arrived.payload), (1, 1));
    assert!(ShmArc::get_mut(&mut arrived).is_some());
    // A copy of the message has nothing.
    assert!(receive(&message).unwrap_err().contains("gone"));
    drop(arrived);
    assert_eq!(drops(), 1);

    // However often it is decoded, no handle is taken that there was not.
    let arc = ShmArc::new_in(&world.heap, world.noisy(2)).unwrap();
    let messages = [send(&arc), send(&arc)];
    assert_eq!(count(&arc), 3);
    let arrived: Vec<_> = (0..5).map(|k| receive(&messages[k % 2]).unwrap()).collect();
    assert_eq!(count(&arc), 6);
    drop(arrived);
    assert_eq!(count(&arc), 1);

    // Not sent after all.
    drop(serde_json::to_string(&[arc.clone(), arc.clone()]).unwrap());
    assert_eq!(count(&arc), 3);
    drop(SENT.take());
    assert_eq!(count(&arc), 1);

    // Never received: it stays, and is not in the way of its place's next value.
    let lost = send(&arc);
    let mut arc = arc;
    assert!(ShmArc::get_mut(&mut arc).is_none());
    drop(arc);
    assert_eq!(drops(), 1);
    drop(receive(&lost).unwrap());
    assert_eq!(drops(), 2);
    let next = ShmArc::new_in(&world.heap, world.noisy(3)).unwrap();
    assert!(receive(&lost).unwrap_err().contains("gone"));
    assert_eq!(count(&next), 1);
    world.heap.verify().unwrap();
}

fn message_of_a_dead_original_is_refused() {
    install_resolver(&Courier);
    let world = World::new();
    let (mut tell, mut told) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let mut arc = Some(ShmArc::new_in(&world.heap, world.noisy(1)).unwrap());
    let child = fork(|| {
        let copy = arc.as_ref().unwrap();
        let message = send(copy);
        assert_eq!(ShmArc::strong_count(copy), 2);
        drop(receive(&message).unwrap());
        told.1.write_all(&[1]).unwrap();
        tell.0.read_exact(&mut [0]).unwrap();
        let refused = serde_json::to_string(copy).unwrap_err().to_string();
        assert!(refused.contains("gone"), "{refused}");
    });
    told.0.read_exact(&mut [0]).unwrap();
    arc = None;
    tell.1.write_all(&[1]).unwrap();
    assert!(child.ended_well());
    assert!(arc.is_none());
    assert_eq!(world.drops().load(SeqCst), 1);
}

fn errors_name_types_and_what_to_do() {
    let world = World::new();
    let arc = ShmArc::new_in(&world.heap, (1_u8, Some(2_u64))).unwrap();
    let text = serde_json::to_string(&arc).unwrap();
    let error = serde_json::from_str::<ShmArc<Noisy>>(&text).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("Noisy") && message.contains("(u8, Option<u64>)"),
        "{message}"
    );
    assert_eq!(ShmArc::strong_count(&arc), 1);
    drop(arc);
    let error = serde_json::from_str::<ShmArc<(u8, Option<u64>)>>(&text).unwrap_err();
    assert!(error.to_string().contains("keep a handle until"), "{error}");
    // The same place, used again: the old descriptor does not find the new value.
    let again = ShmArc::new_in(&world.heap, (1_u8, Some(2_u64))).unwrap();
    assert!(serde_json::from_str::<ShmArc<(u8, Option<u64>)>>(&text).is_err());
    let of_nothing = text.replace("\"index\":0", "\"index\":4000000000");
    assert!(serde_json::from_str::<ShmArc<(u8, Option<u64>)>>(&of_nothing).is_err());
    assert_eq!(ShmArc::strong_count(&again), 1);
    // Into another heap's value.
    let other = Heap::anonymous(&world.arena, 8 << 20).unwrap();
    match ShmArc::new_in(&other, Some(again.clone())) {
        Err(Error::ForeignPointer { type_name, .. }) => assert!(type_name.contains("ShmArc")),
        other => panic!("{:?}", other.map(|_| ())),
    }
    assert_eq!(ShmArc::strong_count(&again), 1);
    let nested = ShmArc::new_in(&world.heap, Some(again)).unwrap();
    assert_eq!(nested.as_ref().as_ref().unwrap().0, 1);
}

/// A child's copies are not counted, whatever it does with them; what goes through shared memory is.
fn copies_by_fork_do_not_count() {
    let world = World::new();
    let arc = ShmArc::new_in(&world.heap, world.noisy(3)).unwrap();
    let mut copy = Some(arc.clone());
    let place = counter(&world);
    let child = fork(|| {
        let mut inherited = copy.take().unwrap();
        assert!(ShmArc::get_mut(&mut inherited).is_none());
        let counted = inherited.clone();
        assert_eq!(ShmArc::strong_count(&counted), 3);
        drop(inherited);
        assert_eq!(ShmArc::strong_count(&counted), 3);
        // Into shared memory, where the parent drops it.
        let nested = ShmArc::new_in(&world.heap, Some(counted)).unwrap();
        place.store(1, SeqCst);
        ShmArc::keep(nested);
    });
    assert!(child.ended_well());
    assert_eq!(place.load(SeqCst), 1);
    assert_eq!(ShmArc::strong_count(&arc), 3);
    assert_eq!(world.drops().load(SeqCst), 0);
    drop(copy);
    assert_eq!(ShmArc::strong_count(&arc), 2);
}

fn counter(world: &World) -> ShmArc<AtomicU64> {
    ShmArc::new_in(&world.heap, AtomicU64::new(0)).unwrap()
}

/// Processes clone, drop, send and resolve at the same time; every value is dropped once.
fn counts_are_exact_under_contention() {
    const ROUNDS: u64 = 3_000;
    let world = World::new();
    let shared = ShmArc::new_in(&world.heap, world.noisy(0)).unwrap();
    let descriptor = ShmArc::descriptor(&shared).unwrap();
    let mailbox = ShmArc::new_in(&world.heap, AtomicU64::new(0)).unwrap();
    let children: Vec<_> = (0..4)
        .map(|number| {
            let (world, mailbox) = (&world, &mailbox);
            fork(move || {
                let mut kept = Vec::new();
                for round in 0..ROUNDS {
                    kept.push(descriptor.resolve().unwrap());
                    kept.last().unwrap().count.fetch_add(1, SeqCst);
                    if kept.len() > 10 {
                        kept.remove((round % 10) as usize);
                    }
                    let own = ShmArc::new_in(&world.heap, world.noisy(number)).unwrap();
                    assert_eq!(own.clone().payload, number);
                    mailbox.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    assert!(children.iter().all(support::Child::ended_well));
    assert_eq!(mailbox.load(SeqCst), 4 * ROUNDS);
    assert_eq!(shared.count.load(SeqCst), 4 * ROUNDS);
    assert_eq!(world.drops().load(SeqCst), 4 * ROUNDS);
    assert_eq!(ShmArc::strong_count(&shared), 1);
    assert_eq!(world.heap.shared_values().unwrap().len(), 2);
    world.heap.verify().unwrap();
}

fn name_is_initialised_once() {
    let world = World::new();
    let runs = ShmArc::new_in(&world.heap, AtomicU64::new(0)).unwrap();
    for round in 0..30 {
        let name = format!("value {round}");
        let children: Vec<_> = (0..4)
            .map(|_| {
                let (world, runs, name) = (&world, &runs, &name);
                fork(move || {
                    let init = || {
                        runs.fetch_add(1, SeqCst);
                        world.noisy(round)
                    };
                    let value = world.heap.named(name, init).unwrap();
                    assert_eq!(value.payload, round);
                    value.count.fetch_add(1, SeqCst);
                })
            })
            .collect();
        assert!(children.iter().all(support::Child::ended_well));
        assert_eq!(runs.load(SeqCst), round + 1);
        let value = world.heap.get_named::<Noisy>(&name).unwrap().unwrap();
        assert_eq!(value.count.load(SeqCst), 4);
        assert_eq!(ShmArc::strong_count(&value), 2);
    }
    match world.heap.named("value 0", || 0_u8) {
        Err(Error::TypeMismatch { expected, found }) => {
            assert_eq!((expected, &*found), ("u8", "Noisy"))
        }
        other => panic!("{other:?}"),
    }
    let removed = world
        .heap
        .remove_named::<Noisy>("value 0")
        .unwrap()
        .unwrap();
    assert_eq!(ShmArc::strong_count(&removed), 1);
    assert!(world.heap.get_named::<Noisy>("value 0").unwrap().is_none());
    assert_eq!(*world.heap.named("value 0", || 5_u8).unwrap(), 5);
    for name in ["", &"x".repeat(256)] {
        assert!(matches!(
            world.heap.named(name, || 0_u8),
            Err(Error::NameLength { .. })
        ));
    }
    let longest = "ü".repeat(127);
    assert_eq!(*world.heap.named(&longest, || 6_u8).unwrap(), 6);
    let failed = world.heap.try_named("fails", || {
        Err::<u8, _>(Error::NameLength {
            len_bytes: 0,
            limit_bytes: 0,
        })
    });
    assert!(failed.is_err());
    let own = std::panic::catch_unwind(|| {
        world
            .heap
            .named("own", || *world.heap.named("own", || 1_u8).unwrap())
    });
    assert!(own.is_err());
    assert_eq!(*world.heap.named("own", || 2_u8).unwrap(), 2);
    world.heap.verify().unwrap();
}

/// What a process does with shared values; the most it holds at a time are 70.
fn everything(world: &World, descriptor: &Descriptor<Noisy>) {
    let make = |k| ShmArc::new_in(&world.heap, world.noisy(k)).unwrap();
    let one = make(1);
    drop(one.clone());
    let mut theirs = descriptor.resolve().unwrap();
    assert!(ShmArc::get_mut(&mut theirs).is_none());
    drop(theirs);
    drop(one);
    let mut two = make(2);
    ShmArc::get_mut(&mut two).unwrap().payload = 22;
    drop(ShmArc::try_unwrap(two).ok());
    let many: Vec<_> = (0..66).map(make).collect();
    drop(many);
    let named = world.heap.named("name", || world.noisy(9)).unwrap();
    assert_eq!(named.payload, 9);
    drop(named);
    let nested = ShmArc::new_in(&world.heap, Some(make(4))).unwrap();
    drop(nested);
    drop(world.heap.remove_named::<Noisy>("name").unwrap());
}

fn crash_at_any_point_leaves_the_others_well() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let ours: Vec<_> = (0..3)
            .map(|k| ShmArc::new_in(&world.heap, world.noisy(100 + k)).unwrap())
            .collect();
        let descriptor = ShmArc::descriptor(&ours[0]).unwrap();
        crash::arm(Some(k));
        let ended_well = fork(|| everything(&world, &descriptor)).ended_well();
        crash::disarm();
        let at = crash::died_at();
        world
            .heap
            .verify()
            .unwrap_or_else(|error| panic!("{at:?}: {error}"));
        let left = world.heap.shared_values().unwrap();
        let count = |is: fn(&RootState) -> bool| left.iter().filter(|info| is(&info.state)).count();
        let half = count(|state| !matches!(state, RootState::Alive { .. }));
        // One, or a value in a value.
        assert!(half <= 2, "{at:?}: {left:?}");
        assert!(
            !left
                .iter()
                .any(|info| matches!(info.state, RootState::Making { .. } | RootState::Dropping)),
            "{left:?}"
        );
        assert!(left.len() <= 3 + 70 && left.len() >= 3);
        if let Some("shm.arc.dropping" | "shm.arc.drop_owned" | "shm.arc.dropped") = at.as_deref() {
            assert!(count(|state| matches!(state, RootState::HalfDropped { .. })) >= 1);
        }
        // Names: made anew, or there.
        let named = world.heap.named("name", || world.noisy(9)).unwrap();
        assert_eq!(named.payload, 9, "{at:?}");
        drop(named);
        world.heap.remove_named::<Noisy>("name").unwrap().unwrap();
        // All places that were half used are found again, before the table grows.
        let before = world.heap.shared_values().unwrap().len();
        let many: Vec<_> = (0..500)
            .map(|k| ShmArc::new_in(&world.heap, world.noisy(k)).unwrap())
            .collect();
        assert!(
            many.iter()
                .enumerate()
                .all(|(k, arc)| arc.payload == k as u64)
        );
        let after = world.heap.shared_values().unwrap();
        assert!(after.len() <= before + 500);
        assert!(
            !after
                .iter()
                .any(|info| matches!(info.state, RootState::HalfMade { .. })),
            "{at:?}"
        );
        // 960 places in four chunks: enough.
        assert!(after.iter().all(|info| info.index < 960), "{at:?}");
        let drops = world.drops().load(SeqCst);
        drop(many);
        assert_eq!(world.drops().load(SeqCst), drops + 500);
        for (k, arc) in ours.iter().enumerate() {
            assert_eq!(arc.payload, 100 + k as u64);
        }
        let handles = ShmArc::strong_count(&ours[0]);
        assert!(handles <= 2, "{at:?}: {handles}");
        drop(ours);
        assert_eq!(
            world.drops().load(SeqCst) - drops - 500,
            if handles == 2 { 2 } else { 3 }
        );
        world.heap.verify().unwrap();
        died_at.extend(at);
        if ended_well {
            break;
        }
    }
    for step in [
        "claiming",
        "claimed",
        "allocated",
        "block_known",
        "written",
        "committed",
        "acquired",
        "dropping",
        "drop_owned",
        "dropped",
        "block_taken",
        "block_freed",
        "root_freed",
        "disowned",
        "hinted",
        "hint_taken",
        "chunk_allocated",
        "chunk_made",
        "name_locked",
        "named",
        "name_allocated",
        "unnamed",
        "taking",
    ] {
        let name = format!("shm.arc.{step}");
        assert!(
            died_at.contains(&name),
            "nobody died at {name}: {died_at:?}"
        );
    }
}

/// A maker dies when the name knows the place of its value, and the place is used for another value: the name has none.
fn name_of_a_dead_maker_does_not_find_another_value() {
    for k in 1.. {
        let world = World::new();
        crash::arm(Some(k));
        let ended_well = fork(|| drop(world.heap.named("name", || 1_u64).unwrap())).ended_well();
        crash::disarm();
        assert!(!ended_well, "nobody died at shm.arc.named");
        if crash::died_at().as_deref() != Some("shm.arc.named") {
            continue;
        }
        // All places of the first chunk but that one; who takes it first dies, too.
        let other = || ShmArc::new_in(&world.heap, 2_u64).unwrap();
        let mut others: Vec<_> = (0..63).map(|_| other()).collect();
        for k in 1.. {
            crash::arm(Some(k));
            let ended_well = fork(|| drop(other())).ended_well();
            crash::disarm();
            assert!(!ended_well, "nobody died at shm.arc.outlived");
            if crash::died_at().as_deref() == Some("shm.arc.outlived") {
                break;
            }
        }
        others.push(other());
        let places = world.heap.shared_values().unwrap();
        assert!(places.iter().all(|place| place.index < 64));
        assert!(world.heap.get_named::<u64>("name").unwrap().is_none());
        assert_eq!(*world.heap.named("name", || 3_u64).unwrap(), 3);
        drop(world.heap.remove_named::<u64>("name").unwrap());
        assert!(others.iter().all(|other| **other == 2));
        world.heap.verify().unwrap();
        return;
    }
}

/// The table itself is made by the first value.
/// Killed while it assigns, which drops the old handle before it writes the new one: the next one assigns too, and no handle is given back twice.
fn crash_in_assignment_lets_others_assign() {
    let mut died_at = BTreeSet::new();
    for k in 1.. {
        let world = World::new();
        let old = ShmArc::new_in(&world.heap, world.noisy(1)).unwrap();
        let new = ShmArc::new_in(&world.heap, world.noisy(2)).unwrap();
        let alone = ShmArc::new_in(&world.heap, world.noisy(3)).unwrap();
        let pair = (old.clone(), Some(alone));
        let place = ShmArc::new_in(&world.heap, ShmMutex::new(pair)).unwrap();
        crash::arm(Some(k));
        let child = fork(|| {
            let mut guard = place.lock().unwrap();
            guard.0 = new.clone();
            guard.1 = Some(new.clone());
        });
        let ended_well = child.ended_well();
        crash::disarm();
        died_at.extend(crash::died_at());
        let mut guard = match place.lock() {
            Ok(guard) => guard,
            Err(died) => died.guard,
        };
        guard.0 = new.clone();
        guard.1 = None;
        // Ours is one handle; another is lost if the dead one had begun to give it back, or to make it.
        assert!((1..=2).contains(&ShmArc::strong_count(&old)), "{k}");
        assert_eq!((old.payload, guard.0.payload), (1, 2));
        drop(guard);
        drop((place, old, new));
        assert!(world.drops().load(SeqCst) <= 3);
        world.heap.verify().unwrap();
        if ended_well {
            assert_eq!(world.drops().load(SeqCst), 3);
            break;
        }
    }
    for point in ["emptied", "dropping", "dropped"] {
        let point = format!("shm.arc.{point}");
        assert!(died_at.contains(&point), "nobody died at {point}");
    }
}

fn crash_while_the_table_is_made_is_recoverable() {
    for k in 1.. {
        let world = World::new();
        crash::arm(Some(k));
        let ended_well = fork(|| drop(world.heap.named("first", || 1_u8).unwrap())).ended_well();
        crash::disarm();
        world.heap.verify().unwrap();
        assert_eq!(*world.heap.named("first", || 1_u8).unwrap(), 1);
        assert!(ShmArc::new_in(&world.heap, 2_u8).is_ok());
        // The directory, the first chunk, an entry, a value, each perhaps twice.
        assert!(world.heap.stats().in_use_blocks <= 8);
        if ended_well {
            assert!(k > 8, "{k}");
            return;
        }
    }
}

/// Somebody waits for the value while its maker is killed.
fn waiter_takes_over_from_a_killed_initialiser() {
    let world = World::new();
    let state = ShmArc::new_in(&world.heap, AtomicU64::new(0)).unwrap();
    let maker = fork(|| {
        let _ = world.heap.named("slow", || {
            state.store(1, SeqCst);
            loop {
                std::thread::park();
            }
            #[allow(unreachable_code)]
            0_u64
        });
    });
    while state.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let waiter = fork(|| {
        state.store(2, SeqCst);
        assert_eq!(*world.heap.named("slow", || 5_u64).unwrap(), 5);
    });
    while state.load(SeqCst) == 1 {
        std::thread::yield_now();
    }
    maker.kill();
    assert!(!maker.ended_well());
    assert!(waiter.ended_well());
    assert_eq!(*world.heap.named("slow", || 6_u64).unwrap(), 5);
}

/// Random kills among processes that use the same values: no hang, no corruption, and what lives is bounded by the dead one's.
fn random_kills_corrupt_nothing() {
    let mut random = Random::new();
    let kills = support::number("NETMCORE_KILLS").unwrap_or(120);
    let world = World::new();
    let shared = ShmArc::new_in(&world.heap, world.noisy(0)).unwrap();
    let descriptor = ShmArc::descriptor(&shared).unwrap();
    let start = || {
        fork(|| {
            loop {
                everything(&world, &descriptor);
            }
        })
    };
    let mut children: Vec<_> = (0..3).map(|_| start()).collect();
    for _ in 0..kills {
        // sleep: to be killed at a random moment.
        std::thread::sleep(std::time::Duration::from_micros(random.below(4_000)));
        let victim = random.below(3) as usize;
        children[victim].kill();
        assert!(!children[victim].ended_well());
        children[victim] = start();
        assert!(ShmArc::new_in(&world.heap, world.noisy(1)).is_ok());
        assert!(descriptor.resolve().is_ok());
    }
    for child in &children {
        child.kill();
        assert!(!child.ended_well());
    }
    assert_eq!(shared.payload, 0);
    world.heap.verify().unwrap();
    let left = world.heap.shared_values().unwrap();
    assert!(left.len() as u64 <= (kills + 3) * 71, "{}", left.len());
    let half = left
        .iter()
        .filter(|info| !matches!(info.state, RootState::Alive { .. }))
        .count();
    assert!(half as u64 <= kills + 3);
}

netmcore_forktest::forktests!(
    handles_count_and_the_last_drops,
    get_mut_makes_descriptors_void,
    descriptors_work_in_forked_children,
    handles_travel_in_messages,
    message_of_a_dead_original_is_refused,
    errors_name_types_and_what_to_do,
    copies_by_fork_do_not_count,
    counts_are_exact_under_contention,
    name_is_initialised_once,
    crash_at_any_point_leaves_the_others_well,
    crash_in_assignment_lets_others_assign,
    crash_while_the_table_is_made_is_recoverable,
    name_of_a_dead_maker_does_not_find_another_value,
    waiter_takes_over_from_a_killed_initialiser,
    random_kills_corrupt_nothing,
);

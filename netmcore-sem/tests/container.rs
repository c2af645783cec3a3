//! Guards against a container in memory that loses a slot, gives one out twice, or leaves a named semaphore that nobody has recorded,
//! because a user of it was killed.
//!
//! `NETMCORE_SEED`, `NETMCORE_CASES` and `NETMCORE_KILLS` replay and lengthen what is random.
//!
//! # Safety
//!
//! Each test maps its memory for ever, and gives it to one container.

#![allow(unsafe_code)]

#[path = "support/folder.rs"]
mod folder;
mod support;

use folder::Folder;
use netmcore_sem::container::SemInfo;
use netmcore_sem::{
    Backend, Error, InMemory, NamedSemaphore, NoRecord, ObjectName, OwnerId, SemContainer, SemId,
    SemMemory, have_anon_semaphores,
};
use netmcore_sys::map::Mapping;
use netmcore_sys::shm::{self, Access};
use netmcore_sys::{crash, process, sem};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{Child, Person, Random, Shared, fork, number, shared, wait_until};

const BACKENDS: [Backend; 2] = [Backend::Native, Backend::Named { mode: 0o600 }];

/// Shared memory for so many semaphores, of which `most` can be mapped.
fn memory(capacity: u32, most: u32) -> SemMemory {
    let file = shm::anonymous(c"sem-container-test").unwrap();
    let mapped_len_bytes = SemMemory::len_bytes_for(most);
    shm::allocate(file.as_fd(), 0, mapped_len_bytes as u64).unwrap();
    let mapping = Mapping::map(file.as_fd(), mapped_len_bytes, Access::ReadWrite).unwrap();
    let at = mapping.as_ptr();
    std::mem::forget(mapping);
    SemMemory {
        at,
        len_bytes: SemMemory::len_bytes_for(capacity),
        mapped_len_bytes,
    }
}

fn unique() -> ObjectName {
    ObjectName::unique(b"/netmcore_sem_container_").unwrap()
}

/// A container, its record, and its users.
struct World {
    container: SemContainer<InMemory>,
    record: Folder,
    shared: &'static Shared,
}

impl World {
    fn new(backend: Backend, capacity: u32) -> World {
        let record = Folder::new();
        // SAFETY: fresh zeros, mapped for ever, nobody else's.
        let container = unsafe {
            SemContainer::create_at(&unique(), backend, memory(capacity, capacity + 2), &record)
        };
        World {
            container: container.unwrap(),
            record,
            shared: shared(),
        }
    }

    fn person(&self, index: u32, generation: u32) -> Person {
        self.shared.person(index, generation)
    }

    fn alloc(&self, initial: u32, person: &Person) -> Result<SemId, Error> {
        let sem = self.container.alloc_as(initial, person, &self.record)?;
        assert_eq!(sem.value(), initial);
        Ok(sem.id())
    }

    fn free(&self, id: SemId, person: &Person) -> Result<(), Error> {
        self.container.free_as(id, person, &self.record)
    }

    fn reclaim(&self, person: &Person) -> u32 {
        self.container.reclaim_as(person, &self.record).unwrap()
    }

    fn infos(&self) -> BTreeMap<SemId, Option<OwnerId>> {
        let infos = self.container.iter();
        infos.map(|SemInfo { id, owner, .. }| (id, owner)).collect()
    }

    /// What exists is recorded.
    fn check_all_is_recorded(&self) {
        let recorded = self.record.names();
        for name in self.names() {
            assert!(recorded.contains(&name), "{}", name.escape_ascii());
        }
    }

    /// And what is recorded exists, but for the container itself; and the container verifies.
    fn check_record_equals_reality(&self) {
        let mut expected = self.names();
        expected.insert(self.container.prefix().as_bytes().to_vec());
        assert_eq!(self.record.names(), expected, "{:?}", crash::died_at());
        let checked = self.container.verify();
        assert!(checked.is_ok(), "{:?}: {checked:?}", crash::died_at());
    }

    /// The named semaphores of the container that exist.
    fn names(&self) -> BTreeSet<Vec<u8>> {
        let prefix = self.container.prefix().as_bytes();
        let names = sem::list().unwrap().into_iter();
        let names = names.map(|name| name.as_bytes().to_vec());
        names.filter(|name| name.starts_with(prefix)).collect()
    }

    /// Every slot can be had; gives them back.
    fn check_all_slots_are_there(&self, person: &Person) {
        let mut ids = Vec::new();
        loop {
            match self.alloc(3, person) {
                Ok(id) => ids.push(id),
                Err(Error::ContainerFull { capacity, .. }) => {
                    assert_eq!(capacity as usize, self.infos().len());
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        ids.into_iter()
            .for_each(|id| self.free(id, person).unwrap());
    }

    fn remove(&self) {
        self.container.unlink(&self.record).unwrap();
        assert_eq!(self.names(), BTreeSet::new());
        assert_eq!(self.record.names(), BTreeSet::new());
    }
}

fn both_backends_do_the_same() {
    assert!(have_anon_semaphores());
    for backend in BACKENDS {
        let world = World::new(backend, 3);
        let container = &world.container;
        let (me, other) = (world.person(0, 1), world.person(1, 1));
        assert_eq!((container.backend(), container.capacity()), (backend, 3));
        let [a, b] = [world.alloc(0, &me), world.alloc(7, &other)].map(Result::unwrap);
        assert_eq!(
            world.infos(),
            BTreeMap::from([(a, Some(me.id)), (b, Some(other.id))])
        );
        let handle = container.get(a).unwrap();
        assert!(!handle.try_wait().unwrap());
        let deadline = Instant::now() + Duration::from_millis(5);
        assert!(!handle.wait_deadline(deadline).unwrap());
        let poster = fork(|| container.get(a).unwrap().post().unwrap());
        handle.wait().unwrap();
        assert!(poster.ended_well());
        assert_eq!(
            (handle.value(), container.get(b).unwrap().value()),
            (0, 7),
            "one semaphore is not the other"
        );
        let huge = world.alloc(1 << 31, &me).unwrap_err();
        assert!(matches!(huge, Error::System { .. }), "{huge}");
        let most = world.alloc(i32::MAX as u32, &me).unwrap();
        let over = container.get(most).unwrap().post().unwrap_err();
        assert!(matches!(over, Error::System { .. }), "{over}");
        let full = world.alloc(0, &me).unwrap_err();
        assert!(
            matches!(full, Error::ContainerFull { capacity: 3, .. }),
            "{full}"
        );
        world.check_record_equals_reality();

        world.free(b, &me).unwrap();
        for gone in [world.free(b, &me), container.get(b).map(drop)] {
            assert!(matches!(gone, Err(Error::NoSemaphore { id, .. }) if id == b));
        }
        let again = world.alloc(1, &me).unwrap();
        assert_eq!(again.index, b.index);
        assert_ne!(again, b, "a stale id finds nothing");
        assert!(container.get(b).is_err() && container.keep(b).is_err());
        let beyond = SemId {
            index: 3,
            generation: 1,
        };
        assert!(container.get(beyond).is_err());

        world.check_record_equals_reality();
        world.remove();
        assert!(matches!(
            world.alloc(0, &me),
            Err(Error::NoContainer { .. })
        ));
        assert!(container.get(a).is_err());
        world.container.unlink(&world.record).unwrap();
    }
}

fn what_the_dead_have_allocated_comes_back_unless_it_is_kept() {
    for backend in BACKENDS {
        let world = World::new(backend, 2);
        let (me, mortal) = (world.person(0, 1), world.person(1, 1));
        let [kept, lost] = [world.alloc(5, &mortal), world.alloc(6, &mortal)].map(Result::unwrap);
        world.container.keep(kept).unwrap();
        world.container.keep(kept).unwrap();
        assert_eq!(world.reclaim(&me), 0, "they live");
        world.shared.settle_death(mortal.id);
        // Allocating looks for it by itself.
        let mine = world.alloc(1, &me).unwrap();
        assert_eq!(mine.index, lost.index);
        assert!(world.container.get(lost).is_err());
        assert_eq!(world.container.get(kept).unwrap().value(), 5);
        assert_eq!(
            world.infos(),
            BTreeMap::from([(kept, None), (mine, Some(me.id))])
        );
        world.check_record_equals_reality();
        world.free(kept, &me).unwrap();
        assert_eq!(world.infos().len(), 1);
        world.remove();
    }
}

fn attached_elsewhere_it_is_the_same_and_grows_for_all() {
    for backend in BACKENDS {
        let (prefix, room) = (unique(), memory(1, 3));
        // SAFETY: here and below: the memory is mapped for ever, all of it.
        let attach = || unsafe { SemContainer::attach_at(room) };
        assert!(matches!(attach(), Err(Error::NoContainer { .. })));
        // SAFETY: fresh zeros, nobody else's.
        let container =
            unsafe { SemContainer::create_at(&prefix, backend, room, &NoRecord) }.unwrap();
        // SAFETY: it is refused.
        let second = unsafe { SemContainer::create_at(&unique(), backend, room, &NoRecord) };
        assert!(matches!(second, Err(Error::NoContainer { .. })));
        let attached = attach().unwrap();
        assert_eq!(attached, container);
        let id = container.alloc(4, &NoRecord).unwrap().id();
        assert_eq!(attached.get(id).unwrap().value(), 4);
        assert!(attached.alloc(0, &NoRecord).is_err());

        let small = SemMemory::new(room.at, SemMemory::len_bytes_for(2));
        // SAFETY: the memory is mapped for ever.
        let narrow = unsafe { SemContainer::attach_at(small) }.unwrap();
        // SAFETY: all of it is mapped and zero, here and in forks.
        unsafe { container.grow_to(SemMemory::len_bytes_for(3)) }.unwrap();
        // SAFETY: it changes nothing.
        unsafe { container.grow_to(0) }.unwrap();
        // SAFETY: it is refused.
        let too_far = unsafe { narrow.grow_to(SemMemory::len_bytes_for(3)) };
        assert!(matches!(too_far, Err(Error::TooSmall { .. })));
        let capacities = [&container, &attached, &narrow].map(|it| it.capacity());
        assert_eq!(capacities, [3, 3, 2]);
        let ids: Vec<_> = (0..2)
            .map(|_| attached.alloc(1, &NoRecord).unwrap().id())
            .collect();
        assert_eq!(container.iter().count(), 3);
        assert_eq!(narrow.iter().count(), 2);
        assert!(narrow.get(ids[1]).is_err(), "it is not mapped there");

        // A child that inherits only the memory.
        let child = fork(|| attach().unwrap().get(ids[1]).unwrap().post().unwrap());
        assert!(child.ended_well());
        assert_eq!(container.get(ids[1]).unwrap().value(), 2);
        attached.unlink(&NoRecord).unwrap();
        assert!(container.get(id).is_err());
        assert!(matches!(attach(), Err(Error::NoContainer { .. })));
    }
}

fn too_little_memory_and_garbage_are_refused() {
    let room = memory(1, 1);
    let short = SemMemory::new(room.at, SemMemory::len_bytes_for(1) - 1);
    // SAFETY: here and below: mapped for ever; refused before anything is made of it.
    let made = unsafe { SemContainer::create_at(&unique(), Backend::Native, short, &NoRecord) };
    assert!(matches!(made, Err(Error::TooSmall { .. })), "{made:?}");
    // SAFETY: as above.
    let attached = unsafe { SemContainer::attach_at(SemMemory::new(room.at, 100)) };
    assert!(matches!(attached, Err(Error::NoContainer { .. })));
    // SAFETY: nobody else has it.
    unsafe { room.at.write_bytes(0xa5, 400) };
    // SAFETY: as above.
    let attached = unsafe { SemContainer::attach_at(room) };
    assert!(matches!(attached, Err(Error::NoContainer { .. })));
    // SAFETY: the magic number of another version.
    unsafe { room.at.copy_from(b"nmc-sem9".as_ptr(), 8) };
    // SAFETY: as above.
    let attached = unsafe { SemContainer::attach_at(room) };
    assert!(matches!(attached, Err(Error::NoContainer { .. })));
}

/// Somebody has made one of the container's names by hand: it is left alone, and the others can be had.
fn name_made_by_hand_is_left_alone() {
    let world = World::new(Backend::Named { mode: 0o600 }, 2);
    let me = world.person(0, 1);
    let names = SemContainer::open(world.container.prefix()).unwrap();
    let theirs = names.create_semaphore(0, 9, 0o600, &NoRecord).unwrap();
    assert_eq!(world.alloc(0, &me).unwrap().index, 1);
    let refused = world.alloc(0, &me).unwrap_err();
    assert!(matches!(refused, Error::AlreadyExists { .. }), "{refused}");
    assert_eq!(theirs.value(), 9);
    let damaged = world.container.verify().unwrap_err();
    assert!(matches!(damaged, Error::Corrupt { .. }), "{damaged}");
    NamedSemaphore::unlink(theirs.name(), &NoRecord).unwrap();
    world.check_record_equals_reality();
    world.remove();
}

/// `create_anew` is the ancestor's `create_container`: what was there before goes.
fn container_is_created_anew_over_an_old_one() {
    let (prefix, record) = (unique(), Folder::new());
    let old = SemContainer::create(&prefix, &record).unwrap();
    old.create_semaphore(1, 1, 0o600, &record).unwrap();
    assert!(SemContainer::create(&prefix, &record).is_err());
    let new = SemContainer::create_anew(&prefix, &record).unwrap();
    assert_eq!(new.numbers().unwrap(), []);
    assert_eq!(record.names().len(), 1);
    new.unlink(&record).unwrap();
    assert!(record.names().is_empty());
}

/// Everything that a user does, in a container of four slots of which the survivor has one.
fn everything(world: &World, person: &Person) {
    let [a, b] = [world.alloc(1, person), world.alloc(2, person)].map(Result::unwrap);
    world.container.keep(a).unwrap();
    world.free(b, person).unwrap();
    world.alloc(3, person).unwrap();
    world.alloc(4, person).unwrap();
    assert!(world.alloc(5, person).is_err());
    world.free(a, person).unwrap();
    // SAFETY: two more slots are mapped and zero.
    unsafe { world.container.grow_to(SemMemory::len_bytes_for(6)) }.unwrap();
    world.alloc(6, person).unwrap();
}

/// After a death at any point what exists is recorded, the survivor's is untouched, and all that was the dead one's comes back.
fn crash_at_any_point_loses_nothing() {
    for backend in BACKENDS {
        let mut died_at = BTreeSet::new();
        for k in 1.. {
            let world = World::new(backend, 4);
            let (survivor, mortal) = (world.person(1, 1), world.person(2, 1));
            let mine = world.alloc(5, &survivor).unwrap();
            crash::arm(Some(k));
            let ended_well = fork(|| everything(&world, &mortal)).ended_well();
            crash::disarm();
            world.shared.settle_death(mortal.id);
            died_at.extend(crash::died_at());
            world.check_all_is_recorded();
            // In either order: allocating reclaims, too.
            if k % 2 == 0 {
                let id = world.alloc(1, &survivor).unwrap();
                world.free(id, &survivor).unwrap();
            }
            world.reclaim(&survivor);
            world.check_record_equals_reality();
            assert_eq!(world.reclaim(&survivor), 0);
            assert_eq!(world.container.get(mine).unwrap().value(), 5);
            // Only what was kept is still there beside our own.
            for (id, owner) in world.infos() {
                if id != mine {
                    assert_eq!(owner, None, "{:?}", crash::died_at());
                    assert_eq!(world.container.get(id).unwrap().value(), 1);
                    world.free(id, &survivor).unwrap();
                }
            }
            assert_eq!(world.infos().len(), 1);
            world.check_all_slots_are_there(&survivor);
            world.check_record_equals_reality();
            world.remove();
            if ended_well {
                break;
            }
        }
        let of_the_slots = [
            "slot_taken",
            "slot_counted",
            "made",
            "allocated",
            "kept",
            "freeing",
            "slot_emptied",
            "slot_freed",
            "grown",
        ];
        for point in of_the_slots {
            let name = format!("sem.container.{point}");
            assert!(
                died_at.contains(&name),
                "nobody died at {name}: {died_at:?}"
            );
        }
        let of_the_backend: &[&str] = match backend {
            Backend::Native => &["sem.container.sem_written"],
            Backend::Named { .. } => &[
                "sem.named.recorded",
                "sem.named.created",
                "sem.named.unlinked",
            ],
        };
        for &point in of_the_backend {
            assert!(died_at.contains(point), "nobody died at {point}");
        }
    }
}

/// Who gives back what the dead have left may die as well: the next goes on.
fn crash_while_reclaiming_is_recoverable() {
    for backend in BACKENDS {
        for k in 1.. {
            let world = World::new(backend, 3);
            let (survivor, first) = (world.person(1, 1), world.person(2, 1));
            for initial in 0..3 {
                world.alloc(initial, &first).unwrap();
            }
            world.shared.settle_death(first.id);
            let second = world.person(3, 1);
            crash::arm(Some(k));
            let ended_well = fork(|| {
                world.reclaim(&second);
            })
            .ended_well();
            crash::disarm();
            world.shared.settle_death(second.id);
            world.check_all_is_recorded();
            world.reclaim(&survivor);
            world.check_record_equals_reality();
            assert_eq!(world.infos().len(), 0);
            world.check_all_slots_are_there(&survivor);
            world.remove();
            if ended_well {
                assert!(k > 6, "{k} points only");
                break;
            }
        }
    }
}

fn crash_while_creating_is_recoverable() {
    for backend in BACKENDS {
        for k in 1.. {
            let (prefix, record, room) = (unique(), Folder::new(), memory(2, 2));
            // SAFETY: zeros, or as the dead one left them; mapped for ever; one after the other.
            let create = || unsafe { SemContainer::create_at(&prefix, backend, room, &record) };
            crash::arm(Some(k));
            let ended_well = fork(|| drop(create().unwrap())).ended_well();
            crash::disarm();
            // SAFETY: mapped for ever.
            let container = match unsafe { SemContainer::attach_at(room) } {
                Ok(container) => container,
                Err(Error::NoContainer { .. }) => create().unwrap(),
                Err(error) => panic!("{error}"),
            };
            assert_eq!((container.capacity(), container.prefix()), (2, &prefix));
            assert_eq!(record.names().len(), 1);
            container.alloc(1, &record).unwrap();
            container.unlink(&record).unwrap();
            assert!(record.names().is_empty());
            if ended_well {
                assert!(k > 3, "{k} points only");
                break;
            }
        }
    }
}

fn crash_while_unlinking_is_recoverable() {
    for backend in BACKENDS {
        for k in 1.. {
            let world = World::new(backend, 3);
            let (me, mortal) = (world.person(1, 1), world.person(2, 1));
            for _ in 0..3 {
                world.alloc(1, &me).unwrap();
            }
            crash::arm(Some(k));
            let ended_well = fork(|| {
                let _me = mortal;
                world.container.unlink(&world.record).unwrap();
            })
            .ended_well();
            crash::disarm();
            world.check_all_is_recorded();
            assert!(ended_well || !world.record.names().is_empty());
            // Whoever does not know of the memory can finish it, too.
            if k % 2 == 0 {
                let names = SemContainer::open(world.container.prefix()).unwrap();
                names.unlink(&world.record).unwrap();
            }
            world.remove();
            if ended_well {
                assert!(k > 1, "{k} points only");
                break;
            }
        }
    }
}

/// Allocating while another unlinks leaves nothing behind.
fn allocating_while_it_is_unlinked_leaves_nothing() {
    for _ in 0..20 {
        let world = World::new(Backend::Named { mode: 0o600 }, 4);
        let person = world.person(0, 1);
        let busy = fork(|| {
            loop {
                match world.alloc(0, &person) {
                    Ok(id) => match world.free(id, &person) {
                        Err(Error::NoContainer { .. }) | Ok(()) => {}
                        Err(error) => panic!("{error}"),
                    },
                    Err(Error::NoContainer { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        wait_until("it is at work", || !world.names().is_empty());
        world.container.unlink(&world.record).unwrap();
        assert!(busy.ended_well());
        assert_eq!(world.names(), BTreeSet::new());
        assert_eq!(world.record.names(), BTreeSet::new());
    }
}

const WORKERS: u32 = 3;

/// Processes allocate and free, and are killed at random: no semaphore is two's, none is lost.
fn random_kills_lose_nothing() {
    let mut random = Random::replayed();
    let kills = number("NETMCORE_KILLS").unwrap_or(60);
    eprintln!("replay: NETMCORE_SEED={} NETMCORE_KILLS={kills}", random.0);
    for backend in BACKENDS {
        let world = World::new(backend, 5);
        let start = |index: u32, generation: u32| -> (Person, Child) {
            let person = world.person(index, generation);
            let child = fork(|| {
                let mut held = Vec::new();
                while world.shared.stop.load(Ordering::Relaxed) == 0 {
                    if held.len() < 2
                        && let Ok(sem) = world.container.alloc_as(1, &person, &world.record)
                    {
                        // Nobody else has it.
                        assert!(sem.try_wait().unwrap() && !sem.try_wait().unwrap());
                        held.push(sem.id());
                    } else if let Some(id) = held.pop() {
                        world.free(id, &person).unwrap();
                    }
                    world.shared.progress[index as usize].fetch_add(1, Ordering::Relaxed);
                }
            });
            (person, child)
        };
        let survivor = world.person(WORKERS, 1);
        let mut workers: Vec<_> = (0..WORKERS).map(|index| start(index, 1)).collect();
        for kill in 0..kills {
            let pause = Instant::now() + Duration::from_micros(random.below(2_000));
            while Instant::now() < pause {
                std::hint::spin_loop();
            }
            let index = random.below(u64::from(WORKERS)) as usize;
            let (person, child) = &workers[index];
            child.kill();
            assert!(!child.ended_well());
            world.shared.settle_death(person.id);
            let made: Vec<u64> = progress(world.shared);
            wait_until("everybody goes on", || {
                (0..WORKERS as usize).all(|it| it == index || progress(world.shared)[it] > made[it])
            });
            workers[index] = start(index as u32, kill as u32 + 2);
        }
        world.shared.stop.store(1, Ordering::SeqCst);
        for (person, child) in &workers {
            assert!(child.ended_well());
            world.shared.settle_death(person.id);
        }
        world.reclaim(&survivor);
        assert_eq!(world.infos().len(), 0);
        world.check_record_equals_reality();
        world.check_all_slots_are_there(&survivor);
        world.remove();
    }
}

fn progress(shared: &Shared) -> Vec<u64> {
    let counts = shared.progress.iter();
    counts.map(|count| count.load(Ordering::SeqCst)).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        by: u32,
        initial: u32,
    },
    Keep {
        which: usize,
    },
    Free {
        which: usize,
        by: u32,
    },
    FreeStale {
        which: usize,
    },
    Post {
        which: usize,
    },
    TryWait {
        which: usize,
    },
    Grow {
        capacity: u32,
    },
    Reclaim,
    /// Another process does this and is killed at its `at`th crash point, if it gets so far.
    Die {
        ops: Vec<Op>,
        at: u64,
    },
    /// One of us is gone, with all that it has.
    Gone {
        who: u32,
    },
}

fn quiet_op() -> impl Strategy<Value = Op> {
    let which = || 0..8_usize;
    let by = || 0..2_u32;
    prop_oneof![
        4 => (by(), 0..4_u32).prop_map(|(by, initial)| Op::Alloc { by, initial }),
        1 => which().prop_map(|which| Op::Keep { which }),
        3 => (which(), by()).prop_map(|(which, by)| Op::Free { which, by }),
        1 => which().prop_map(|which| Op::FreeStale { which }),
        1 => which().prop_map(|which| Op::Post { which }),
        1 => which().prop_map(|which| Op::TryWait { which }),
        1 => (1..7_u32).prop_map(|capacity| Op::Grow { capacity }),
        1 => Just(Op::Reclaim),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let dying = prop::collection::vec(quiet_op(), 1..5);
    prop_oneof![
        10 => quiet_op(),
        1 => (0..2_u32).prop_map(|who| Op::Gone { who }),
        2 => (dying, 1..20_u64).prop_map(|(ops, at)| Op::Die { ops, at }),
    ]
}

/// The oracle: who has what, with how many permits.
#[derive(Clone, Default)]
struct Naive {
    sems: BTreeMap<SemId, (Option<u32>, u32)>,
    freed: Vec<SemId>,
    capacity: usize,
}

impl Naive {
    fn pick(&self, which: usize) -> Option<SemId> {
        let count = self.sems.len().max(1);
        self.sems.keys().nth(which % count).copied()
    }
}

/// Both do it, and agree on what comes of it.
fn act(world: &World, naive: &mut Naive, people: &mut [Person; 2], op: &Op) {
    let container = &world.container;
    match op {
        Op::Alloc { by, initial } => match world.alloc(*initial, &people[*by as usize]) {
            Ok(id) => {
                assert!(naive.sems.len() < naive.capacity);
                assert!((id.index as usize) < naive.capacity);
                let index_is_taken = naive.sems.keys().any(|other| other.index == id.index);
                assert!(!index_is_taken && !naive.freed.contains(&id));
                naive.sems.insert(id, (Some(*by), *initial));
            }
            Err(Error::ContainerFull { .. }) => assert_eq!(naive.sems.len(), naive.capacity),
            Err(error) => panic!("{error}"),
        },
        Op::Keep { which } => {
            if let Some(id) = naive.pick(*which) {
                container.keep(id).unwrap();
                naive.sems.get_mut(&id).unwrap().0 = None;
            }
        }
        Op::Free { which, by } => {
            if let Some(id) = naive.pick(*which) {
                world.free(id, &people[*by as usize]).unwrap();
                naive.sems.remove(&id);
                naive.freed.push(id);
            }
        }
        Op::FreeStale { which } => {
            if let Some(&id) = naive.freed.get(*which) {
                assert!(world.free(id, &people[0]).is_err());
            }
        }
        Op::Post { which } => {
            if let Some(id) = naive.pick(*which) {
                container.get(id).unwrap().post().unwrap();
                naive.sems.get_mut(&id).unwrap().1 += 1;
            }
        }
        Op::TryWait { which } => {
            if let Some(id) = naive.pick(*which) {
                let permits = &mut naive.sems.get_mut(&id).unwrap().1;
                assert_eq!(container.get(id).unwrap().try_wait().unwrap(), *permits > 0);
                *permits = permits.saturating_sub(1);
            }
        }
        Op::Grow { capacity } => {
            // SAFETY: six slots are mapped, and zero until they are used.
            unsafe { container.grow_to(SemMemory::len_bytes_for(*capacity)) }.unwrap();
            naive.capacity = naive.capacity.max(*capacity as usize);
        }
        Op::Reclaim => {
            world.reclaim(&people[0]);
        }
        Op::Gone { who } => {
            let person = &mut people[*who as usize];
            world.shared.settle_death(person.id);
            naive.sems.retain(|&id, (by, _)| {
                let stays = *by != Some(*who);
                if !stays {
                    naive.freed.push(id);
                }
                stays
            });
            *person = world.person(*who, person.id.generation + 1);
            world.reclaim(person);
        }
        Op::Die { ops, at } => {
            let before = naive.sems.clone();
            let mortal = world.person(2, naive.freed.len() as u32 + process::random_u64() as u32);
            crash::arm(Some(*at));
            let child = fork(|| {
                // It touches only what is its own, so that the oracle knows what must be as it was.
                let mut own = Naive {
                    capacity: usize::MAX,
                    ..Naive::default()
                };
                for op in ops {
                    match op {
                        Op::Grow { .. } => {}
                        Op::Alloc { initial, .. } => {
                            if let Ok(id) = world.alloc(*initial, &mortal) {
                                own.sems.insert(id, (Some(2), *initial));
                            }
                        }
                        // What it kept would stay.
                        Op::Keep { .. } => {}
                        op => act(world, &mut own, &mut [mortal, mortal], op),
                    }
                }
            });
            child.ended_well();
            crash::disarm();
            world.check_all_is_recorded();
            world.shared.settle_death(mortal.id);
            world.reclaim(&people[0]);
            assert_eq!(naive.sems, before);
        }
    }
}

/// Both agree on everything.
fn compare(world: &World, naive: &Naive, people: &[Person; 2]) {
    let container = &world.container;
    let infos = world.infos();
    let expected = naive.sems.iter();
    let expected = expected.map(|(&id, &(by, _))| (id, by.map(|by| people[by as usize].id)));
    assert_eq!(infos, expected.collect::<BTreeMap<_, _>>());
    for (&id, &(_, permits)) in &naive.sems {
        assert_eq!(container.get(id).unwrap().value(), permits);
    }
    assert_eq!(container.capacity() as usize, naive.capacity);
    world.check_record_equals_reality();
}

fn container_matches_a_map() {
    let cases = number("NETMCORE_CASES").unwrap_or(60);
    let seed = number("NETMCORE_SEED").unwrap_or_else(process::random_u64);
    eprintln!("replay: NETMCORE_SEED={seed} NETMCORE_CASES={cases}");
    for backend in BACKENDS {
        let mut runner = TestRunner::new(Config {
            cases: cases as u32,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            ..Config::default()
        });
        let outcome = runner.run(&prop::collection::vec(op(), 1..40), |ops| {
            let world = World::new(backend, 4);
            let mut people = [world.person(0, 1), world.person(1, 1)];
            let mut naive = Naive {
                capacity: 4,
                ..Naive::default()
            };
            for op in &ops {
                act(&world, &mut naive, &mut people, op);
                compare(&world, &naive, &people);
            }
            world.check_all_slots_are_there_or_kept(&people[0]);
            world.remove();
            Ok(())
        });
        outcome.unwrap();
    }
}

impl World {
    fn check_all_slots_are_there_or_kept(&self, person: &Person) {
        for id in self.infos().into_keys() {
            self.free(id, person).unwrap();
        }
        assert_eq!(self.infos().len(), 0);
        self.check_all_slots_are_there(person);
    }
}

netmcore_forktest::forktests!(
    both_backends_do_the_same,
    what_the_dead_have_allocated_comes_back_unless_it_is_kept,
    attached_elsewhere_it_is_the_same_and_grows_for_all,
    too_little_memory_and_garbage_are_refused,
    name_made_by_hand_is_left_alone,
    container_is_created_anew_over_an_old_one,
    crash_at_any_point_loses_nothing,
    crash_while_reclaiming_is_recoverable,
    crash_while_creating_is_recoverable,
    crash_while_unlinking_is_recoverable,
    allocating_while_it_is_unlinked_leaves_nothing,
    random_kills_lose_nothing,
    container_matches_a_map,
);

//! Guards against memory that lies at different addresses, that is out of reach for being younger than its user, that goes while
//! somebody looks at it, and that stays when nobody does.
//!
//! # Safety
//! Regions are read and written as atomics only.
#![allow(unsafe_code)]

#[path = "objects/mod.rs"]
mod objects;
mod trial;

use std::os::fd::AsFd as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use netmcore_proc::{
    Access, Error, Region, ResourceId, ResourceRepr, ResourceType, ShmObject,
    create_preallocated_shm, create_preallocated_shm_sc, create_region, create_shm,
    destroy_resources, get_region, get_resource, get_sem_container, get_shm, record, release,
    spawn,
};
use netmcore_sys::{ObjectName, shm};
use objects::{assert_gone, assert_there, exists, wait_until};
use trial::{Channel, SIGKILL, Trial, in_a_worker, is_killed_by};

netmcore_forktest::forktests!(
    region_is_at_one_address_for_old_and_young_workers_creator_and_master,
    region_made_before_the_run_is_used_in_it,
    region_is_mapped_when_it_is_first_resolved,
    captured_region_is_mapped_in_workers,
    growth_is_seen_by_all,
    region_does_not_grow_beyond_its_maximum,
    impossible_regions_are_refused_and_leave_nothing,
    places_are_never_given_twice,
    region_with_container_is_found_by_either_call,
    object_of_another_type_is_no_region,
    unknown_region_is_told,
    last_user_gone_gives_the_memory_back,
    killed_users_region_goes,
    release_does_not_end_a_mapping,
    mapping_outlives_its_function_while_threads_look,
    mapping_in_the_master_lasts_to_the_end_of_the_run,
    destroyed_region_stays_readable_where_it_is_mapped,
    child_of_a_worker_sees_what_its_parent_has_mapped,
    region_is_used_from_many_threads,
    second_run_makes_regions_of_its_own,
);

const MIB: u64 = 1 << 20;

/// The word at an offset of a region.
fn word_at(region: &Region, offset: usize) -> &'static AtomicU64 {
    assert!(offset + 8 <= region.max_len_bytes());
    // SAFETY: in bounds, aligned (offsets are), mapped until the process ends, and an atomic for all.
    unsafe { &*region.at().add(offset).cast() }
}

fn word(region: &Region) -> &'static AtomicU64 {
    word_at(region, 0)
}

fn address(region: &Region) -> u64 {
    region.at().addr() as u64
}

fn repr_of(id: ResourceId) -> ResourceRepr {
    get_resource(id).unwrap().repr().clone()
}

/// Adds to the first word, and says where it lies.
fn add_one(id: ResourceId) -> (u64, u64) {
    let region = get_region(id).unwrap();
    (address(&region), word(&region).fetch_add(1, SeqCst))
}

// ---- one address ---------------------------------------------------------------------------------

fn region_is_at_one_address_for_old_and_young_workers_creator_and_master() {
    let trial = Trial::new();
    let ids: &'static Channel = Channel::new();
    let ids_for_old: &'static Channel = Channel::new();
    let end: &'static Channel = Channel::new();
    let mut master = trial.master();
    let old = master.def_process(move |()| add_one(ResourceId::from_raw(ids_for_old.receive())));
    let creator = master.def_process(move |()| {
        let (id, name) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        let ResourceRepr::PosixShmPreallocated { name: its, at, .. } = repr_of(id) else {
            panic!("it is something else");
        };
        assert_eq!(its, name);
        let region = get_region(id).unwrap();
        assert_eq!((address(&region), region.name()), (at, Some(&name)));
        assert_eq!(word(&region).fetch_add(1, SeqCst), 0);
        ids.send(id.get());
        end.receive();
        assert_eq!(word(&region).load(SeqCst), 4);
        at
    });
    let from_master = std::rc::Rc::new(std::cell::Cell::new(None));
    let in_hook = std::rc::Rc::clone(&from_master);
    let master_made: &'static Channel = Channel::new();
    let first = master.def_process(move |(): ()| {
        // It runs before there is a region.
        let old = old.start(&()).unwrap();
        let creator = creator.start(&()).unwrap();
        let id = ResourceId::from_raw(ids.receive());
        let (here, seen) = add_one(id);
        assert_eq!(seen, 1);
        assert_eq!(spawn(add_one, &id).unwrap().join().unwrap(), (here, 2));
        ids_for_old.send(id.get());
        assert_eq!(old.join().unwrap(), (here, 3));
        end.send(0);
        assert_eq!(creator.join().unwrap(), here);

        let id = ResourceId::from_raw(master_made.receive());
        (add_one(id), spawn(add_one, &id).unwrap().join().unwrap())
    });
    let master = master.init(move |_| {
        let (id, _) = create_preallocated_shm("/nmc-regions-", 8192)?;
        let region = get_region(id)?;
        word(&region).store(40, SeqCst);
        in_hook.set(Some((id, address(&region))));
        master_made.send(id.get());
        Ok(())
    });
    let result = master.run_with(
        || first.fork_point().start(&()),
        |process| {
            let (id, at) = from_master.get().unwrap();
            let seen = first.join_point().join_nowait(process).unwrap().unwrap();
            assert_eq!(seen, ((at, 40), (at, 41)));
            let region = get_region(id).unwrap();
            assert_eq!((address(&region), word(&region).load(SeqCst)), (at, 42));
        },
    );
    result.unwrap();
    trial.check_nothing_is_left();
}

fn region_made_before_the_run_is_used_in_it() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|id: ResourceId| {
        let young = spawn(add_one, &id).unwrap().join().unwrap();
        (young, add_one(id))
    });
    let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
    let region = get_region(id).unwrap();
    assert_eq!(word(&region).swap(5, SeqCst), 0);
    let at = address(&region);
    let seen = trial.run(master, &first, &id);
    assert_eq!(seen, ((at, 5), (at, 6)));
    // The program still has it mapped: what it took out of the run stays readable.
    assert_eq!(word(&region).load(SeqCst), 7);
    assert!(get_region(id).is_ok(), "it is mapped here");
}

fn region_is_mapped_when_it_is_first_resolved() {
    in_a_worker(|| {
        let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        let mapped = |id: ResourceId| {
            let ResourceRepr::PosixShmPreallocated { at, .. } = repr_of(id) else {
                panic!("it is something else");
            };
            let count = || {
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                maps.lines()
                    .filter(|line| line.starts_with(&format!("{at:x}-")) && line.contains("rw-s"))
                    .count()
            };
            let before = count();
            let region = get_region(id).unwrap();
            assert_eq!(get_region(id).unwrap(), region);
            (before, count())
        };
        assert_eq!(mapped(id), (0, 1));
        assert_eq!(spawn(mapped, &id).unwrap().join().unwrap(), (0, 1));
    });
}

fn captured_region_is_mapped_in_workers() {
    let trial = Trial::new();
    let mut master = trial.master();
    let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
    let region = get_region(id).unwrap();
    let late = std::rc::Rc::new(std::cell::Cell::new(None));
    let count = {
        let region = region.clone();
        master.def_process(move |()| word(&region).fetch_add(1, SeqCst))
    };
    let first = master.def_process(move |()| {
        let running: Vec<_> = (0..3).map(|_| count.start(&()).unwrap()).collect();
        let mut seen: Vec<_> = running.iter().map(|one| one.join().unwrap()).collect();
        seen.sort_unstable();
        seen
    });
    let in_hook = std::rc::Rc::clone(&late);
    let master = master.init(move |controller| {
        let (id, _) = create_preallocated_shm("/nmc-regions-", 4096)?;
        let region = get_region(id)?;
        let add = controller.def_process(move |more: u64| word(&region).fetch_add(more, SeqCst));
        in_hook.set(Some(add));
        Ok(())
    });
    let seen = trial.run(master, &first, &());
    assert_eq!(seen, [0, 1, 2]);
    assert!(late.get().is_some());
    assert_eq!(word(&region).load(SeqCst), 3);
}

// ---- length --------------------------------------------------------------------------------------

fn growth_is_seen_by_all() {
    in_a_worker(|| {
        let (resource, region) = create_region("/nmc-regions-", 4096, 64 * MIB).unwrap();
        assert_eq!(region.len_bytes().unwrap(), 4096);
        let grower = spawn(
            |id: ResourceId| {
                let region = get_region(id).unwrap();
                assert_eq!(region.max_len_bytes() as u64, 64 * MIB);
                region.grow(32 * MIB).unwrap();
                word_at(&region, 32 * MIB as usize - 8).store(9, SeqCst);
            },
            &resource.id(),
        );
        grower.unwrap().join().unwrap();
        assert_eq!(region.len_bytes().unwrap(), 32 * MIB);
        assert_eq!(word_at(&region, 32 * MIB as usize - 8).load(SeqCst), 9);
    });
}

fn region_does_not_grow_beyond_its_maximum() {
    in_a_worker(|| {
        let (_resource, region) = create_region("/nmc-regions-", 0, 4 * MIB).unwrap();
        region.grow(4 * MIB).unwrap();
        let error = region.grow(4 * MIB + 1).unwrap_err();
        assert!(error.to_string().contains("maximum"), "{error}");

        let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        let region = get_region(id).unwrap();
        assert_eq!(region.max_len_bytes(), Region::DEFAULT_MAX_LEN_BYTES);
    });
}

fn impossible_regions_are_refused_and_leave_nothing() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let longer_than_max = create_region("/nmc-regions-", 8192, 4096);
        assert!(matches!(longer_than_max, Err(Error::Memory { .. })));
        let no_addresses = create_region("/nmc-regions-", 4096, 1 << 50).unwrap_err();
        assert!(no_addresses.to_string().contains("arena"), "{no_addresses}");
        let no_memory = create_preallocated_shm("/nmc-regions-", 1 << 42).unwrap_err();
        assert!(matches!(no_memory, Error::Memory { .. }), "{no_memory}");
        assert!(matches!(
            create_preallocated_shm("no-slash", 4096),
            Err(Error::InvalidName(_))
        ));
        assert_eq!(objects::recorded(&dir), Default::default());
    });
    trial.run(master, &first, &());
}

fn places_are_never_given_twice() {
    in_a_worker(|| {
        let make = |()| {
            let (resource, region) = create_region("/nmc-regions-", 4096, MIB).unwrap();
            let at = address(&region);
            resource.release().unwrap();
            at
        };
        let mut places: Vec<u64> = (0..20)
            .map(|_| spawn(make, &()).unwrap().join().unwrap())
            .collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 20);
    });
}

// ---- what it is ----------------------------------------------------------------------------------

fn region_with_container_is_found_by_either_call() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let (id, name, container) = create_preallocated_shm_sc("/nmc-regions-", 4096).unwrap();
        let repr = repr_of(id);
        assert_eq!(repr.ty(), ResourceType::PosixShmPreallocatedSc);
        assert_eq!(repr.container_prefix(), Some(container.prefix()));
        assert_there(&dir, &repr);
        let log = record().unwrap();
        drop(container.create_semaphore(0, 3, 0o600, &log).unwrap());
        let other = spawn(
            |id: ResourceId| {
                let resource = get_sem_container(id).unwrap();
                let container = resource.container().unwrap();
                let value = container.open_semaphore(0).unwrap().value();
                let region = resource.region().unwrap();
                word(&region).store(8, SeqCst);
                (value, get_region(id).unwrap() == region)
            },
            &id,
        );
        assert_eq!(other.unwrap().join().unwrap(), (3, true));
        assert_eq!(word(&get_region(id).unwrap()).load(SeqCst), 8);

        let (plain, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        let error = get_sem_container(plain).unwrap_err();
        assert!(matches!(
            error,
            Error::NoResource {
                found: Some(ResourceType::PosixShmPreallocated),
                ..
            }
        ));
        // It is shared memory by name, too.
        let object = ShmObject::open(&name, Access::ReadWrite).unwrap();
        assert_eq!(object.len_bytes().unwrap(), 4096);
        repr
    });
    let repr = trial.run(master, &first, &());
    assert_gone(trial.dir(), &repr);
}

fn object_of_another_type_is_no_region() {
    in_a_worker(|| {
        let object = create_shm("/nmc-regions-", 4096).unwrap();
        let error = get_region(object.id()).unwrap_err();
        let found = Some(ResourceType::PosixShm);
        assert!(
            matches!(error, Error::NoResource { found: its, .. } if its == found),
            "{error}"
        );
        let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        assert!(matches!(get_shm(id), Err(Error::NoResource { .. })));
    });
}

fn unknown_region_is_told() {
    in_a_worker(|| {
        for number in [9999, u64::MAX, 0] {
            let error = get_region(ResourceId::from_raw(number)).unwrap_err();
            assert!(
                matches!(error, Error::NoResource { .. } | Error::Memory { .. }),
                "{error:?}"
            );
        }
    });
    // Outside of a run there is nobody to ask.
    assert!(matches!(
        get_region(ResourceId::from_raw(3)),
        Err(Error::NotRunning { .. })
    ));
    let error = create_preallocated_shm("/nmc-regions-", 4096).unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
}

// ---- the end -------------------------------------------------------------------------------------

/// The object, open, so that it can be looked at when it has no name any more.
fn open(name: &ObjectName) -> std::os::fd::OwnedFd {
    shm::open(name, Access::ReadWrite).unwrap()
}

fn last_user_gone_gives_the_memory_back() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let (id, name) = create_preallocated_shm("/nmc-regions-", MIB).unwrap();
        let repr = repr_of(id);
        let object = open(&name);
        release(id).unwrap();
        assert_gone(&dir, &repr);
        assert_eq!(shm::len(object.as_fd()).unwrap(), 0);
        assert!(matches!(get_region(id), Err(Error::NoResource { .. })));

        // By the end of a process it has gone before the join.
        let user = |()| {
            let (resource, region) = create_region("/nmc-regions-", MIB, MIB).unwrap();
            word(&region).store(1, SeqCst);
            let id = resource.keep();
            repr_of(id)
        };
        let repr = spawn(user, &()).unwrap().join().unwrap();
        assert_gone(&dir, &repr);
    });
    trial.run(master, &first, &());
}

fn killed_users_region_goes() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let ids: &'static Channel = Channel::new();
    let mut master = trial.master();
    let holds = master.def_process(move |()| {
        let (resource, region) = create_region("/nmc-regions-", MIB, MIB).unwrap();
        word(&region).store(1, SeqCst);
        ids.send(resource.id().get());
        loop {
            std::thread::park();
        }
    });
    let first = master.def_process(move |()| {
        let holder = holds.start(&()).unwrap();
        let id = ResourceId::from_raw(ids.receive());
        let resource = get_resource(id).unwrap();
        let repr = resource.repr().clone();
        let object = open(resource.name().unwrap());
        holder.kill().unwrap();
        let outcome: Result<(), _> = holder.join();
        assert!(is_killed_by(SIGKILL, &outcome.unwrap_err()));
        // This process is a user still.
        assert_there(&dir, &repr);
        resource.release().unwrap();
        wait_until("the region is gone", || !exists(&repr));
        wait_until("its memory is given back", || {
            shm::len(object.as_fd()).unwrap() == 0
        });
    });
    trial.run(master, &first, &());
}

fn release_does_not_end_a_mapping() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let first = master.def_process(move |()| {
        let (resource, region) = create_region("/nmc-regions-", 4096, MIB).unwrap();
        let id = resource.id();
        let repr = resource.repr().clone();
        resource.release().unwrap();
        assert!(matches!(release(id), Err(Error::NotAUser { .. })));
        // It is there as long as it is mapped here.
        assert_there(&dir, &repr);
        word(&region).store(3, SeqCst);
        assert_eq!(spawn(add_one, &id).unwrap().join().unwrap().1, 3);
        repr
    });
    let repr = trial.run(master, &first, &());
    assert!(!exists(&repr));
}

fn mapping_outlives_its_function_while_threads_look() {
    in_a_worker(|| {
        let looks = |()| {
            let (resource, region) = create_region("/nmc-regions-", 4096, MIB).unwrap();
            let word = word(&region);
            let started: &'static std::sync::Barrier =
                Box::leak(Box::new(std::sync::Barrier::new(2)));
            std::thread::spawn(move || {
                started.wait();
                loop {
                    word.fetch_add(1, SeqCst);
                }
            });
            started.wait();
            resource.keep();
        };
        // A bus error would fail them.
        for _ in 0..50 {
            spawn(looks, &()).unwrap().join().unwrap();
        }
    });
}

fn mapping_in_the_master_lasts_to_the_end_of_the_run() {
    let trial = Trial::new();
    let dir = trial.dir().to_path_buf();
    let mut master = trial.master();
    let (id, name) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
    let region = get_region(id).unwrap();
    release(id).unwrap();
    let first = master.def_process(move |()| {
        assert_there(&dir, &repr_of(id));
        add_one(id).1
    });
    let object = open(&name);
    assert_eq!(trial.run(master, &first, &()), 0);
    assert!(shm::open(&name, Access::ReadWrite).is_err());
    assert_eq!(word(&region).load(SeqCst), 1);
    // Not given back while the program looks at it.
    assert_eq!(shm::len(object.as_fd()).unwrap(), 4096);
}

fn destroyed_region_stays_readable_where_it_is_mapped() {
    let trial = Trial::new();
    let mut master = trial.master();
    let first = master.def_process(|()| ());
    let (resource, region) = create_region("/nmc-regions-", 4096, MIB).unwrap();
    word(&region).store(6, SeqCst);
    let repr = resource.repr().clone();
    let id = resource.keep();
    destroy_resources().unwrap();
    assert!(!exists(&repr));
    assert_eq!(word(&region).load(SeqCst), 6);
    assert!(matches!(get_resource(id), Err(Error::NoResource { .. })));
    trial.run(master, &first, &());
}

fn child_of_a_worker_sees_what_its_parent_has_mapped() {
    in_a_worker(|| {
        let (resource, region) = create_region("/nmc-regions-", 4096, MIB).unwrap();
        let (unmapped, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        // SAFETY: one thread; the child leaves by `exit_now`.
        let child = match unsafe { netmcore_sys::process::fork() }.unwrap() {
            netmcore_sys::process::Forked::Child => {
                word(&region).store(4, SeqCst);
                let is_known = get_region(resource.id()).is_ok();
                let is_refused = matches!(get_region(unmapped), Err(Error::NotRunning { .. }));
                netmcore_sys::process::exit_now(i32::from(!(is_known && is_refused)));
            }
            netmcore_sys::process::Forked::Parent(pid) => pid,
        };
        let status = netmcore_sys::process::PidFd::open(child)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(
            status,
            netmcore_sys::process::ExitStatus::Exited { code: 0 }
        );
        assert_eq!(word(&region).load(SeqCst), 4);
    });
}

fn region_is_used_from_many_threads() {
    in_a_worker(|| {
        let ids: Vec<ResourceId> = (0..8)
            .map(|_| create_preallocated_shm("/nmc-regions-", 4096).unwrap().0)
            .collect();
        let work = |ids: Vec<ResourceId>| {
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| ids.iter().for_each(|&id| assert_ne!(add_one(id).0, 0)));
                }
            });
        };
        let running: Vec<_> = (0..4).map(|_| spawn(work, &ids).unwrap()).collect();
        running.iter().for_each(|one| one.join().unwrap());
        for id in ids {
            assert_eq!(word(&get_region(id).unwrap()).load(SeqCst), 32);
        }
    });
}

fn second_run_makes_regions_of_its_own() {
    let trial = Trial::new();
    let mut places = Vec::new();
    for round in 0..3 {
        let mut master = trial.master();
        let (id, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
        let region = get_region(id).unwrap();
        let first = master.def_process(move |()| {
            let (young, _) = create_preallocated_shm("/nmc-regions-", 4096).unwrap();
            let other = spawn(add_one, &young).unwrap().join().unwrap();
            let captured = word(&region).fetch_add(round, SeqCst);
            (add_one(young) == (other.0, 1), captured, add_one(id).1)
        });
        let region = get_region(id).unwrap();
        assert_eq!(trial.run(master, &first, &()), (true, 0, round));
        assert_eq!(word(&region).load(SeqCst), round + 1);
        places.push((region, round + 1));
    }
    for (region, value) in places {
        assert_eq!(word(&region).load(SeqCst), value);
    }
}

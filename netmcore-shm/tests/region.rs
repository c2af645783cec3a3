//! Guards against processes that see different memory at one address, growth that others do not see or that ends in a signal, and
//! handles that name what they should not.
//!
//! # Safety
//!
//! Shared memory is looked at as atomics, at addresses inside of mapped regions; what shall not be mapped is touched in children only, which
//! are killed for it. Children are forked from a process with one thread.

#![allow(unsafe_code)]

mod support;

use netmcore_shm::{
    AnonRegion, Arena, Error, NoRecord, ObjectName, Region, RegionId, Resolver, ShmObject,
    SpaceLimit, forget_regions, forget_regions_if, install_resolver, region_of, resolve,
};
use netmcore_sys::process::{self, Limit, Resource, get_limit, set_limit};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use support::{PATIENCE, fork};

const MAX: usize = 64 << 20;
const MIB: u64 = 1 << 20;

/// A name that is unlinked at the end of the test, whatever happens.
struct Name(ObjectName);

impl Name {
    fn new() -> Name {
        Name(ObjectName::unique(b"/region_test_").unwrap())
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = ShmObject::unlink(&self.0, &NoRecord);
    }
}

fn arena() -> Arena {
    Arena::reserve(Arena::MIN_LEN_BYTES).unwrap()
}

fn word(address: usize) -> &'static AtomicU64 {
    // SAFETY: the tests name words of regions, which stay mapped until they end, or die.
    unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(address) }
}

fn base(region: &Region) -> usize {
    region.at().expose_provenance()
}

/// Words that the processes of a test tell each other.
struct Board(AnonRegion);

impl Board {
    fn new(arena: &Arena) -> Board {
        Board(AnonRegion::create(c"board", arena, 4096).unwrap())
    }

    fn word(&self, index: usize) -> &'static AtomicU64 {
        assert!(index < 512);
        word(self.0.at().expose_provenance() + 8 * index)
    }

    fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    /// Waits until the word is not 0.
    fn get(&self, index: usize) -> u64 {
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
}

fn region_is_attached_at_the_same_address_by_a_process_forked_before() {
    let arena = arena();
    let board = Board::new(&arena);
    let name = Name::new();
    let child = fork(|| {
        let at = board.get(0) as usize;
        let id = RegionId(77);
        let region = Region::attach(&arena, id, &name.0, at, MAX).unwrap();
        assert_eq!((region.at().addr(), region.id()), (at, id));
        assert_eq!(region.max_len_bytes(), MAX);
        assert_eq!(word(at + 8).load(Ordering::SeqCst), 4711);
        // A second time it is the same.
        assert_eq!(
            Region::attach(&arena, id, &name.0, at, MAX).unwrap(),
            region
        );
        // The other has grown it; then it is our turn.
        board.set(1, 1);
        board.get(2);
        assert_eq!(region.len_bytes().unwrap(), 3 * MIB);
        assert_eq!(word(at + (3 << 20) - 8).load(Ordering::SeqCst), 5);
        region.grow(5 * MIB).unwrap();
        word(at + (5 << 20) - 8).store(6, Ordering::SeqCst);
        board.set(3, 1);
    });
    let region = Region::create(&arena, &name.0, 100, MAX, &NoRecord).unwrap();
    let at = base(&region);
    assert_eq!(region.id(), RegionId(at as u64));
    assert_eq!(region.len_bytes().unwrap(), 4096);
    word(at + 8).store(4711, Ordering::SeqCst);
    board.set(0, at as u64);
    board.get(1);
    region.grow(3 * MIB).unwrap();
    region.grow(2 * MIB).unwrap();
    word(at + (3 << 20) - 8).store(5, Ordering::SeqCst);
    board.set(2, 1);
    board.get(3);
    assert_eq!(region.len_bytes().unwrap(), 5 * MIB);
    assert_eq!(word(at + (5 << 20) - 8).load(Ordering::SeqCst), 6);
    assert!(child.ended_well());
}

fn inherited_regions_grow_without_descriptors() {
    let arena = arena();
    let name = Name::new();
    let named = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    let anonymous = Region::anonymous(&arena, c"anonymous", MAX).unwrap();
    assert_eq!(anonymous.len_bytes().unwrap(), 0);
    for region in [named, anonymous] {
        let last = base(&region) + (2 << 20) - 8;
        let child = fork(|| {
            // SAFETY: nothing in the child uses a descriptor that it got from its parent.
            unsafe { process::close_range(3, i32::MAX) }.unwrap();
            region.grow(2 * MIB).unwrap();
            word(last).store(9, Ordering::SeqCst);
        });
        assert!(child.ended_well());
        assert_eq!(region.len_bytes().unwrap(), 2 * MIB);
        assert_eq!(word(last).load(Ordering::SeqCst), 9);
        // A descriptor that has another's number now is nothing to us either.
        region.grow(3 * MIB).unwrap();
        assert_eq!(word(last).load(Ordering::SeqCst), 9);
    }
}

fn name_of_another_object_is_not_touched() {
    let arena = arena();
    let name = Name::new();
    let region = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    word(base(&region)).store(1, Ordering::SeqCst);
    ShmObject::unlink(&name.0, &NoRecord).unwrap();
    assert!(matches!(region.grow(MIB), Err(Error::System { .. })));
    let other = ShmObject::create(&name.0, 4096, 0o600, &NoRecord).unwrap();
    assert!(matches!(region.grow(MIB), Err(Error::WrongPlace { .. })));
    assert!(matches!(region.len_bytes(), Err(Error::WrongPlace { .. })));
    assert_eq!(other.len_bytes().unwrap(), 4096);
    assert_eq!(word(base(&region)).load(Ordering::SeqCst), 1);
}

fn region_ends_at_its_maximum() {
    let arena = arena();
    let name = Name::new();
    let named = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    let anonymous = Region::anonymous(&arena, c"anonymous", MAX).unwrap();
    for region in [named, anonymous] {
        for wanted in [MAX as u64 + 1, u64::MAX] {
            match region.grow(wanted) {
                Err(Error::NoSpace {
                    limit: SpaceLimit::Region,
                    free_bytes,
                    ..
                }) => assert_eq!(free_bytes, MAX as u64),
                other => panic!("{other:?}"),
            }
        }
        region.grow(MAX as u64).unwrap();
        assert_eq!(region.len_bytes().unwrap(), MAX as u64);
        word(base(&region) + MAX - 8).store(1, Ordering::SeqCst);
    }
    let other = Name::new();
    let refused = Region::create(&arena, &other.0, 2, 0, &NoRecord);
    assert!(refused.is_ok(), "rounded up to a page: {refused:?}");
    let other = Name::new();
    let refused = Region::create(&arena, &other.0, 4097, 4096, &NoRecord);
    assert!(matches!(
        refused,
        Err(Error::NoSpace {
            limit: SpaceLimit::Region,
            ..
        })
    ));
    let opened = ShmObject::open(&other.0, netmcore_shm::Access::ReadOnly);
    assert!(opened.is_err(), "nothing is left");
}

fn full_arena_leaves_no_object() {
    let arena = arena();
    let name = Name::new();
    let refused = Region::create(&arena, &name.0, 4096, 2 << 30, &NoRecord);
    assert!(
        matches!(refused, Err(Error::ArenaFull { .. })),
        "{refused:?}"
    );
    assert!(ShmObject::open(&name.0, netmcore_shm::Access::ReadOnly).is_err());
    assert!(matches!(
        Region::anonymous(&arena, c"large", 2 << 30),
        Err(Error::ArenaFull { .. })
    ));
}

fn places_are_checked() {
    let arena = arena();
    let (name, other_name) = (Name::new(), Name::new());
    let region = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    let object = ShmObject::create(&other_name.0, 4096, 0o600, &NoRecord).unwrap();
    let at = base(&region);
    let attach = |id, at| Region::attach(&arena, RegionId(id), object.name(), at, MAX);
    let base = arena.base().addr();
    for (id, at) in [
        (5, at),                             // another's
        (5, base),                           // the arena's own page
        (5, base - (4 << 20)),               // before it
        (5, at + (128 << 20)),               // not placed yet
        (5, base + arena.len_bytes()),       // behind it
        (5, 0),                              // nowhere
        (5, usize::MAX - 4095),              // at the end
        (5, at + 4096),                      // inside of another's
        (region.id().0, at + (2 << 20)),     // elsewhere
        (region.id().0, at.wrapping_sub(8)), // elsewhere
    ] {
        let refused = attach(id, at);
        assert!(
            matches!(refused, Err(Error::WrongPlace { .. })),
            "{id} {at:x}: {refused:?}"
        );
    }
    word(at).store(1, Ordering::SeqCst);
    let place = arena.place(MAX).unwrap();
    let attached = attach(5, place.at().addr()).unwrap();
    assert_eq!(region_of(attached.at()), Some(attached.clone()));
    assert_eq!(
        region_of(attached.at().wrapping_add(MAX - 1)),
        Some(attached.clone())
    );
    assert_eq!(region_of(attached.at().wrapping_add(MAX)), None);
    assert_eq!(region_of(region.at()), Some(region));
    assert_eq!(region_of(&raw const arena), None);
}

/// Attaches to one object under the id 3, and knows no other.
struct OneRegion {
    arena: Arena,
    name: ObjectName,
    at: usize,
    asked: AtomicU64,
}

impl Resolver for OneRegion {
    fn attach(&self, id: RegionId) -> netmcore_shm::Result<Region> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if id != RegionId(3) {
            return Err(Error::NoRegion { id });
        }
        Region::attach(&self.arena, id, &self.name, self.at, MAX)
    }
}

fn forgotten_regions_are_out_of_reach_until_resolved() {
    let arena = arena();
    let name = Name::new();
    let object = ShmObject::create(&name.0, 4096, 0o600, &NoRecord).unwrap();
    let at = arena.place(MAX).unwrap().at().expose_provenance();
    assert!(matches!(
        resolve(RegionId(3)),
        Err(Error::NoRegion { id: RegionId(3) })
    ));
    let resolver = Box::leak(Box::new(OneRegion {
        arena: arena.clone(),
        name: object.name().clone(),
        at,
        asked: AtomicU64::new(0),
    }));
    install_resolver(resolver);
    assert!(matches!(resolve(RegionId(4)), Err(Error::NoRegion { .. })));
    let region = resolve(RegionId(3)).unwrap();
    assert_eq!(resolve(RegionId(3)).unwrap(), region);
    assert_eq!(resolver.asked.load(Ordering::SeqCst), 2, "once for each");
    word(at).store(11, Ordering::SeqCst);
    let anonymous = Region::anonymous(&arena, c"anonymous", MAX).unwrap();
    anonymous.grow(4096).unwrap();
    let anonymous_word = base(&anonymous);
    for forgotten in [at, anonymous_word, anonymous_word + MAX] {
        let child = fork(|| {
            // SAFETY: nothing uses them but what shall be killed for it.
            assert_eq!(unsafe { forget_regions() }.unwrap(), 2);
            word(forgotten).load(Ordering::SeqCst);
        });
        assert_eq!(child.signal(), Some(11));
    }
    let child = fork(|| {
        // SAFETY: as above.
        unsafe { forget_regions() }.unwrap();
        assert_eq!(region_of(anonymous.at()), None);
        let region = resolve(RegionId(3)).unwrap();
        assert_eq!(word(at).swap(12, Ordering::SeqCst), 11);
        region.grow(MIB).unwrap();
    });
    assert!(child.ended_well());
    assert_eq!(word(at).load(Ordering::SeqCst), 12);
    assert_eq!(region.len_bytes().unwrap(), MIB);
    for kept in [RegionId(3), anonymous.id()] {
        let child = fork(|| {
            // SAFETY: as above.
            let forgotten = unsafe { forget_regions_if(|region| region.id() != kept) };
            assert_eq!(forgotten.unwrap(), 1);
            let is_known = [&region, &anonymous].map(|region| region_of(region.at()).is_some());
            assert_eq!(is_known, [region.id() == kept, anonymous.id() == kept]);
            assert_eq!(resolve(kept).unwrap().id(), kept);
            assert_eq!(
                word(at).load(Ordering::SeqCst),
                if kept == RegionId(3) { 12 } else { 0 },
                "unmapped"
            );
        });
        match kept {
            RegionId(3) => assert!(child.ended_well()),
            _ => assert_eq!(child.signal(), Some(11)),
        }
    }
    assert_eq!(region_of(anonymous.at()), Some(anonymous));
}

fn limited_file_size_is_an_error_and_not_a_signal() {
    let arena = arena();
    let name = Name::new();
    let region = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    let old = get_limit(Resource::FileSizeBytes).unwrap();
    let limit = Limit {
        soft: Some(MIB),
        hard: old.hard,
    };
    set_limit(Resource::FileSizeBytes, limit).unwrap();
    match region.grow(2 * MIB) {
        Err(Error::NoSpace {
            limit: SpaceLimit::FileSize,
            free_bytes,
            ..
        }) => assert_eq!(free_bytes, MIB),
        other => panic!("{other:?}"),
    }
    region.grow(MIB).unwrap();
    match Region::anonymous(&arena, c"anonymous", MAX) {
        Err(Error::NoSpace {
            limit: SpaceLimit::FileSize,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
}

/// Memory that the object really has, in bytes.
fn taken_bytes(object: &ShmObject) -> u64 {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let fd = object.as_fd().try_clone_to_owned().unwrap();
    std::fs::File::from(fd).metadata().unwrap().blocks() * 512
}

fn punched_memory_is_given_back_and_can_be_taken_again() {
    let arena = arena();
    let name = Name::new();
    let region = Region::create(&arena, &name.0, 8 * MIB, MAX, &NoRecord).unwrap();
    let object = ShmObject::open(&name.0, netmcore_shm::Access::ReadOnly).unwrap();
    assert_eq!(taken_bytes(&object), 8 * MIB);
    let at = base(&region);
    word(at).store(1, Ordering::SeqCst);
    word(at + (2 << 20)).store(2, Ordering::SeqCst);
    word(at + (7 << 20)).store(3, Ordering::SeqCst);
    // SAFETY: nobody else uses it.
    unsafe { region.punch(MIB + 1, 5 * MIB) }.unwrap();
    assert_eq!(taken_bytes(&object), 3 * MIB + 4096, "rounded inwards");
    assert_eq!(region.len_bytes().unwrap(), 8 * MIB);
    let values = [0, 2 << 20, 7 << 20].map(|offset| word(at + offset).load(Ordering::SeqCst));
    assert_eq!(values, [1, 0, 3]);
    region.ensure(MIB, 5 * MIB).unwrap();
    assert_eq!(taken_bytes(&object), 8 * MIB);
    // Of nothing, and beyond the end.
    // SAFETY: nobody else uses it.
    unsafe {
        region.punch(10, 20).unwrap();
        region.punch(u64::MAX - 10, u64::MAX).unwrap();
    }
    region.ensure(10, 0).unwrap();
    assert_eq!(word(at).load(Ordering::SeqCst), 1);
}

fn regions_are_left_out_of_core_dumps() {
    let arena = arena();
    let name = Name::new();
    let named = Region::create(&arena, &name.0, 4096, MAX, &NoRecord).unwrap();
    let anonymous = Region::anonymous(&arena, c"anonymous", MAX).unwrap();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    for region in [named, anonymous] {
        let begins = format!("{:x}-", region.at().addr());
        let lines = maps.lines().skip_while(|line| !line.starts_with(&begins));
        let flags = lines
            .into_iter()
            .find(|line| line.starts_with("VmFlags:"))
            .unwrap();
        assert!(flags.contains(" dd"), "{flags}");
    }
}

netmcore_forktest::forktests!(
    region_is_attached_at_the_same_address_by_a_process_forked_before,
    inherited_regions_grow_without_descriptors,
    name_of_another_object_is_not_touched,
    region_ends_at_its_maximum,
    full_arena_leaves_no_object,
    places_are_checked,
    forgotten_regions_are_out_of_reach_until_resolved,
    limited_file_size_is_an_error_and_not_a_signal,
    punched_memory_is_given_back_and_can_be_taken_again,
    regions_are_left_out_of_core_dumps,
);

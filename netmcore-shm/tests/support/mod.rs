//! What the tests here share: a heap with a table of who lives, and children that are killed.
//!
//! # Safety
//!
//! The shared page is mapped as long as its world and holds atomics only. Each block has one user at a time. Children are forked from a process with one thread.

#![allow(dead_code, unsafe_code)]

use netmcore_sem::{OwnerId, Owners, announce_death};
use netmcore_shm::{AnonRegion, Arena, Block, TaggedHeap};
use netmcore_sys::process::{self, ExitStatus, Forked, PidFd};
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PEOPLE: usize = 8;
/// Longer than anything that is in order, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What lies in shared memory beside the heap. All zeros at first.
#[repr(C)]
pub struct Shared {
    pub deaths: AtomicU32,
    /// The generation that lives at each index; 0 for nobody.
    alive: [AtomicU32; PEOPLE],
    pub stop: AtomicU32,
    pub progress: [AtomicU64; PEOPLE],
    /// Blocks that are passed around: offset and length in units of 64 bytes.
    pub parcels: [AtomicU64; 16],
}

/// A heap and what belongs to it, for a test and its children.
pub struct World {
    pub arena: Arena,
    pub region: AnonRegion,
    shared_region: AnonRegion,
    pub heap: TaggedHeap,
}

impl World {
    pub fn new(heap_len_bytes: usize) -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES.max(2 * heap_len_bytes)).unwrap();
        let region = AnonRegion::create(c"heap", &arena, heap_len_bytes).unwrap();
        let shared_region = AnonRegion::create(c"people", &arena, 4096).unwrap();
        // SAFETY: the region is new and kept beside the view.
        let heap = unsafe { TaggedHeap::create(region.at(), region.len_bytes()) }.unwrap();
        World {
            arena,
            region,
            shared_region,
            heap,
        }
    }

    pub fn shared(&self) -> &Shared {
        // SAFETY: a page of zeros, aligned, mapped as long as the world; all fields are atomics.
        unsafe { &*self.shared_region.at().cast::<Shared>() }
    }

    pub fn person(&self, index: u32, generation: u32) -> Person<'_> {
        self.shared().alive[index as usize].store(generation, Ordering::Release);
        Person {
            world: self,
            id: OwnerId { index, generation },
        }
    }

    /// What a supervisor does after it has reaped somebody.
    pub fn settle_death(&self, id: OwnerId) {
        self.shared().alive[id.index as usize].store(0, Ordering::Release);
        announce_death(&self.shared().deaths);
    }

    /// Fills a block with a pattern of its own: all of a small one, the ends and some between of a large one.
    pub fn fill(&self, block: Block, of: u64) {
        // SAFETY: the tests give each block to one user.
        let bytes = unsafe { self.heap.bytes_mut(block) }.unwrap();
        for index in places(bytes.len()) {
            bytes[index] = pattern(block, of, index);
        }
    }

    /// Checks that nobody else has written to it.
    pub fn check(&self, block: Block, of: u64) {
        // SAFETY: as for `fill`.
        let bytes = unsafe { self.heap.bytes(block) }.unwrap();
        for index in places(bytes.len()) {
            let expected = pattern(block, of, index);
            assert_eq!(bytes[index], expected, "{block:?} of {of} at {index}");
        }
    }

    /// The memory that the heap's region really has, whoever has it mapped; `None` where only root may ask.
    pub fn memory_bytes(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let start = self.region.at().addr();
        let end = start + self.region.len_bytes();
        let file = format!("/proc/self/map_files/{start:x}-{end:x}");
        Some(std::fs::metadata(file).ok()?.blocks() * 512)
    }

    /// Nothing is lost: with no block in use, all the memory is one free run.
    pub fn check_whole(&self, person: Person<'_>) {
        let stats = self.heap.stats();
        assert_eq!((stats.in_use_blocks, stats.in_use_bytes), (0, 0));
        let tag = tag(999_999);
        let all = self.heap.alloc(stats.max_bytes as usize, tag, &person);
        assert!(self.heap.free(all.unwrap(), tag));
        self.heap.verify().unwrap();
    }
}

fn places(len: usize) -> impl Iterator<Item = usize> {
    let step = if len < 1_000 { 1 } else { 509 };
    (0..len).step_by(step).chain(len.checked_sub(1))
}

fn pattern(block: Block, of: u64, index: usize) -> u8 {
    (block.offset / 64 + of * 37 + index as u64) as u8
}

#[derive(Clone, Copy)]
pub struct Person<'a> {
    pub world: &'a World,
    pub id: OwnerId,
}

impl Owners for Person<'_> {
    fn me(&self) -> OwnerId {
        self.id
    }
    fn is_alive(&self, owner: OwnerId) -> bool {
        let place = &self.world.shared().alive[owner.index as usize];
        place.load(Ordering::Acquire) == owner.generation
    }
    fn deaths(&self) -> &AtomicU32 {
        &self.world.shared().deaths
    }
}

pub fn tag(number: u64) -> NonZeroU64 {
    NonZeroU64::new(number).unwrap()
}

/// Runs `body` in a forked child, which then exits.
pub fn fork(body: impl FnOnce()) -> Child {
    // SAFETY: the tests have one thread, and the child leaves by `exit_now`; a panic in it ends the process too.
    match unsafe { process::fork() }.unwrap() {
        Forked::Parent(pid) => Child {
            pidfd: PidFd::open(pid).unwrap(),
        },
        Forked::Child => {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            process::exit_now(if done.is_ok() { 0 } else { 101 })
        }
    }
}

pub struct Child {
    pidfd: PidFd,
}

impl Child {
    /// Waits for its end; true if it ended well, false if it was killed.
    pub fn ended_well(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.pidfd.wait_nonblocking().unwrap() {
                Some(ExitStatus::Exited { code: 0 }) => return true,
                Some(ExitStatus::Signaled { signal: 9, .. }) => return false,
                Some(other) => panic!("a child ended by {other:?}"),
                None => assert!(Instant::now() < deadline, "a child hangs"),
            }
            // sleep: between looks; only the deadline above decides.
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Waits for its end; the signal that killed it.
    pub fn signal(&self) -> Option<i32> {
        match self.pidfd.wait().unwrap() {
            ExitStatus::Signaled { signal, .. } => Some(signal),
            ExitStatus::Exited { .. } => None,
        }
    }

    pub fn kill(&self) {
        self.send(9);
    }

    pub fn send(&self, signal: i32) {
        self.pidfd.send_signal(signal).unwrap();
    }
}

/// Random numbers from a seed; xorshift.
pub struct Random(pub u64);

impl Random {
    /// Seeded by `NETMCORE_SEED`, or anew.
    pub fn new() -> Random {
        let seed = number("NETMCORE_SEED").unwrap_or_else(process::random_u64);
        eprintln!("replay: NETMCORE_SEED={seed}");
        Random(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Lets something time out that says for how long it waited. Its clock begins when it is called, so it is called again if the
/// caller was held up just before.
pub fn assert_times_out(wait: Duration, attempt: impl Fn(Instant) -> Duration) {
    let says_so = || {
        let started = Instant::now();
        let waited = attempt(started + wait);
        let elapsed = started.elapsed();
        assert!(elapsed >= wait, "it gave up after {elapsed:?}");
        assert!(waited <= elapsed, "{waited:?} of {elapsed:?}");
        waited >= wait
    };
    assert!((0..20).any(|_| says_so()), "it never waited {wait:?}");
}

/// Leaks something in a thread, and returns what that gives when the thread is at its end: gone, or asleep there for good.
pub fn leak_in_a_thread<R: Send>(leak: impl FnOnce() -> R + Send) -> R {
    let slot = Mutex::new(None);
    std::thread::scope(|scope| {
        scope.spawn(|| *slot.lock().unwrap() = Some((leak(), process::Pid::this_thread())));
    });
    let (leaked, thread) = slot.into_inner().unwrap().unwrap();
    // "running", or the number of the call: that of futex.
    let is_through = || {
        let call = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall"));
        call.map_or(true, |call| {
            ["202 ", "98 "]
                .iter()
                .any(|number| call.starts_with(number))
        })
    };
    let deadline = Instant::now() + PATIENCE;
    while !is_through() {
        assert!(Instant::now() < deadline, "a thread does not end");
        std::thread::yield_now();
    }
    leaked
}

//! Under which id the calling thread acts: the owners that this process has, and a copy of each thread's id.
//!
//! **Protocol.** [`install`] names the owners of this process; without, they are [`SoloOwners`]. The first
//! [`Owners::me`] of a thread asks them and keeps the answer, which is good until other owners are installed or the process
//! is a forked child: then it asks again. A thread that ends tells the owners so, once for each id that it was given; and last of all, since
//! guards may lie in its thread-local variables: while a guard can be used its owner is alive.
//!
//! Each thread counts what it *holds*: the guards that refer to what they guard. One that ends and holds something still has leaked a guard, and
//! another thread may use what that refers to. So it does not tell of its end, and its id lives until the process is dead; where the id is that of the
//! thread itself ([`SoloOwners`]), the thread stays, asleep.
//!
//! The kernel says what is a forked child: the *fork epoch* is a word in a page that reads zero after a fork
//! (`MADV_WIPEONFORK`), whoever forked. Zero is replaced by a number that no ancestor of the process has had.
//!
//! **Invariants.**
//! 1. Two processes, of which one is a copy of the other, have different fork epochs.
//! 2. A kept id is used only in the process, the thread and under the owners that gave it: while its [`Standing`] holds.
//! 3. While a reference can be used that a guard has given, the id under which the guard was made is alive, or the process is not.
//!
//! **If a process dies here.** All of this is its own.
//!
//! # Safety
//!
//! Two pointers are dereferenced: each is null, or to something that lives for ever and is published whole, by a store with
//! release order.

#![allow(unsafe_code)]

use crate::owner::{OwnerId, Owners, SoloOwners, Waiting};
use netmcore_sys::futex;
use netmcore_sys::process::at_thread_end;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64};
use std::time::Duration;

type Installed = &'static (dyn Owners + Sync);

/// The installed owners; null for none. What it points to is never freed, so that no two installations have
/// the same address.
static INSTALLED: AtomicPtr<Installed> = AtomicPtr::new(ptr::null_mut());

/// The owners of this process: those [installed](install), else [`SoloOwners`].
///
/// [`me`](Owners::me) makes no system call, but for the first time in a thread, after a fork, and after an installation.
/// Beside installed owners, those without a supervisor are known too, so that a program outside may use the same locks.
///
/// A thread that has leaked a guard is alive as long as its process: references that the guard has given may be used by others. Its end is not
/// told to the owners; and one without a supervisor does not end, so who joins it waits for ever.
#[derive(Clone, Copy, Debug, Default)]
pub struct Current;

/// Makes `owners` those of this process. A supervisor's process does it before it takes its first lock.
///
/// It holds for forked children too, until they install their own. Locks that threads of this process hold stay theirs
/// under the former id: install before taking any. Each call takes 16 bytes for good.
///
/// # Safety
///
/// - What `owners` says is true: no two threads are given the same id, in all processes that share locks; an id of which it says that it is not alive
///   acts no more. Locks that protect values believe it, and would give one value to two.
pub unsafe fn install(owners: &'static (dyn Owners + Sync)) {
    INSTALLED.store(Box::leak(Box::new(owners)), Release);
}

/// Makes [`SoloOwners`] those of this process again, as at its start. They take all that have an id of a supervisor for alive.
pub fn uninstall() {
    INSTALLED.store(ptr::null_mut(), Release);
}

fn installed(at: *const Installed) -> Option<Installed> {
    // SAFETY: null, or leaked by `install`, which published it whole.
    unsafe { at.as_ref() }.copied()
}

/// What this thread was last told.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// The fork epoch then; 0 for nothing kept.
    epoch: u64,
    installed: *const Installed,
    me: OwnerId,
    /// Which answer this is, of all that threads of the process were given; 0 for none.
    answer: u64,
}

const NOTHING_KEPT: Kept = Kept {
    epoch: 0,
    installed: ptr::null(),
    me: OwnerId {
        index: 0,
        generation: 0,
    },
    answer: 0,
};

static ANSWERS: AtomicU64 = AtomicU64::new(0);

/// Under which id a thread acts, and since when it does: for what it keeps under that id, and has to find quickly.
#[derive(Clone, Copy, Debug)]
pub struct Standing(Kept);

impl Standing {
    /// That of the calling thread.
    pub fn now() -> Standing {
        Current.me();
        Standing(KEPT.get())
    }

    /// The id.
    pub fn id(&self) -> OwnerId {
        self.0.me
    }

    /// Whether the calling thread is the same and has the same id. Four loads, and no call: where it would take one to tell, it says no.
    #[inline]
    pub fn holds(&self) -> bool {
        // SAFETY: as in `fork_epoch`.
        let word = unsafe { EPOCH.load(Acquire).as_ref() };
        word.is_some_and(|word| word.load(Relaxed) == self.0.epoch)
            && INSTALLED.load(Acquire).cast_const() == self.0.installed
            && KEPT.get().answer == self.0.answer
    }
}

thread_local! {
    // Without a destructor: it can be used to the very end of the thread.
    static KEPT: Cell<Kept> = const { Cell::new(NOTHING_KEPT) };
}

thread_local! {
    // As above.
    static HOLDS: Cell<usize> = const { Cell::new(0) };
}

/// A part of what refers to something that the calling thread keeps from others under its id, such as a guard of a lock. If it is leaked, the id lives as long
/// as the process (invariant 3). It stays in its thread. A forked child has copies, which count for nobody else.
#[derive(Debug)]
pub struct Holding(PhantomData<*const ()>);

impl Holding {
    /// One more.
    #[inline]
    pub fn begin() -> Holding {
        HOLDS.set(HOLDS.get() + 1);
        Holding(PhantomData)
    }
}

impl Drop for Holding {
    #[inline]
    fn drop(&mut self) {
        HOLDS.set(HOLDS.get() - 1);
    }
}

impl Owners for Current {
    #[inline]
    fn me(&self) -> OwnerId {
        let kept = KEPT.get();
        if kept.epoch == fork_epoch() && kept.installed == INSTALLED.load(Acquire) {
            kept.me
        } else {
            ask()
        }
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        match supervisor_of(owner) {
            Some(owners) => owners.is_alive(owner),
            None => SoloOwners.is_alive(owner),
        }
    }

    fn deaths(&self) -> &AtomicU32 {
        match installed(INSTALLED.load(Acquire)) {
            Some(owners) => owners.deaths(),
            None => crate::sync::no_deaths(),
        }
    }

    fn recheck_every(&self, owner: OwnerId) -> Option<Duration> {
        match supervisor_of(owner) {
            Some(owners) => owners.recheck_every(owner),
            None => SoloOwners.recheck_every(owner),
        }
    }

    fn recheck(&self) -> Option<Duration> {
        match installed(INSTALLED.load(Acquire)) {
            Some(owners) => owners.recheck(),
            None => SoloOwners.recheck(),
        }
    }

    fn patience(&self) -> Option<Duration> {
        installed(INSTALLED.load(Acquire))?.patience()
    }

    fn sleeps(&self, on: Waiting) {
        if let Some(owners) = installed(INSTALLED.load(Acquire)) {
            owners.sleeps(on);
        }
    }

    fn wakes(&self) {
        if let Some(owners) = installed(INSTALLED.load(Acquire)) {
            owners.wakes();
        }
    }
}

/// The installed owners, if the index is one of theirs.
fn supervisor_of(owner: OwnerId) -> Option<Installed> {
    if is_solo(owner) {
        return None;
    }
    installed(INSTALLED.load(Acquire))
}

#[cold]
fn ask() -> OwnerId {
    let epoch = fork_epoch();
    let at = INSTALLED.load(Acquire);
    let owners = installed(at);
    let me = owners.map_or_else(|| SoloOwners.me(), Owners::me);
    let is_told = at_thread_end(Box::new(move || {
        // In a forked child the id is the parent's.
        if epoch != fork_epoch() {
            return;
        }
        KEPT.set(NOTHING_KEPT);
        match owners {
            _ if HOLDS.get() != 0 => stay(me),
            Some(owners) => owners.thread_ends(me),
            None => {}
        }
    }));
    // Without a key its id is given back with its process; that of a thread itself is not.
    if let Err(error) = is_told
        && is_solo(me)
    {
        panic!("a thread cannot take locks whose end would not be noticed: {error}");
    }
    KEPT.set(Kept {
        epoch,
        installed: at,
        me,
        answer: ANSWERS.fetch_add(1, Relaxed) + 1,
    });
    me
}

/// The end of a thread that holds something, and whose id shall live as long as the process.
#[cold]
fn stay(me: OwnerId) {
    static NEVER: AtomicU32 = AtomicU32::new(0);
    while is_solo(me) {
        futex::wait(&NEVER, 0, None);
    }
}

/// Whether it is the id of a thread without a supervisor.
fn is_solo(owner: OwnerId) -> bool {
    owner.index >= SoloOwners::INDEX_BASE
}

/// The word that the kernel wipes, once it is mapped.
static EPOCH: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
/// The highest epoch of this process and its ancestors.
static LAST_EPOCH: AtomicU64 = AtomicU64::new(0);
/// Whether the kernel cannot wipe pages: the epoch is the process id then.
static WIPING_IS_MISSING: AtomicBool = AtomicBool::new(false);

/// A number that tells a process from those it was forked from, however it was forked: not 0, the same for its
/// whole life. For copies of facts about a process, which are wrong in its children.
///
/// Two loads. (Before Linux 4.14 a system call, and a child may have the number of an ancestor that is long
/// dead.)
#[inline]
pub fn fork_epoch() -> u64 {
    // SAFETY: null, or the word that `new_epoch` published and nobody unmaps.
    if let Some(word) = unsafe { EPOCH.load(Acquire).as_ref() } {
        let epoch = word.load(Relaxed);
        if epoch != 0 {
            return epoch;
        }
    }
    new_epoch()
}

#[cold]
fn new_epoch() -> u64 {
    let mut at = EPOCH.load(Acquire);
    if at.is_null() {
        at = match wiped_word() {
            Some(word) => word,
            None => return u64::from(netmcore_sys::process::Pid::this().get().cast_unsigned()),
        };
    }
    // SAFETY: as in `fork_epoch`.
    let word = unsafe { &*at };
    let next = LAST_EPOCH.fetch_add(1, Relaxed) + 1;
    match word.compare_exchange(0, next, Relaxed, Relaxed) {
        Ok(_) => next,
        // Another thread was quicker.
        Err(epoch) => epoch,
    }
}

fn wiped_word() -> Option<*mut AtomicU64> {
    if WIPING_IS_MISSING.load(Relaxed) {
        return None;
    }
    let Ok(word) = netmcore_sys::map::word_wiped_on_fork() else {
        WIPING_IS_MISSING.store(true, Relaxed);
        return None;
    };
    let word = ptr::from_ref(word).cast_mut();
    match EPOCH.compare_exchange(ptr::null_mut(), word, Release, Acquire) {
        Ok(_) => Some(word),
        // Another thread was quicker; a page is lost.
        Err(there) => Some(there),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Gives out indices, and notes which threads have ended.
    struct Counting {
        next: AtomicU32,
        /// Who, and whether its standing held.
        ended: Mutex<Vec<(OwnerId, bool)>>,
        deaths: AtomicU32,
    }

    impl Owners for Counting {
        fn me(&self) -> OwnerId {
            OwnerId {
                index: self.next.fetch_add(1, Relaxed),
                generation: 9,
            }
        }
        fn is_alive(&self, owner: OwnerId) -> bool {
            owner.generation == 9
        }
        fn deaths(&self) -> &AtomicU32 {
            &self.deaths
        }
        fn thread_ends(&self, me: OwnerId) {
            let holds = NOTED.get().is_some_and(|standing| standing.holds());
            self.ended.lock().unwrap().push((me, holds));
        }
    }

    thread_local! {
        static NOTED: Cell<Option<Standing>> = const { Cell::new(None) };
    }

    fn counting() -> &'static Counting {
        Box::leak(Box::new(Counting {
            next: AtomicU32::new(1),
            ended: Mutex::new(Vec::new()),
            deaths: AtomicU32::new(0),
        }))
    }

    // One test: the installation is of the whole process.
    #[test]
    fn installed_owners_are_asked_once_for_each_thread_and_told_of_its_end() {
        let (standing, solo) = (Standing::now(), Current.me());
        assert_eq!(solo, SoloOwners.me());
        assert_eq!(standing.id(), solo);
        assert!(standing.holds());
        assert!(Current.recheck().is_some());

        let owners = counting();
        // SAFETY: each thread has an id of its own; nobody takes a lock.
        unsafe { install(owners) };
        assert!(!standing.holds());
        let me = Current.me();
        assert_eq!(me.index, 1);
        assert_eq!(Current.me(), me);
        let other = std::thread::spawn(|| {
            let standing = Standing::now();
            assert_eq!(Current.me(), Current.me());
            assert!(standing.holds());
            NOTED.set(Some(standing));
            Current.me()
        });
        assert_eq!(other.join().unwrap().index, 2);
        assert_eq!(
            *owners.ended.lock().unwrap(),
            [(
                OwnerId {
                    index: 2,
                    generation: 9
                },
                false
            )]
        );
        assert!(std::ptr::eq(Current.deaths(), &raw const owners.deaths));
        assert_eq!((Current.recheck(), Current.recheck_every(me)), (None, None));
        let stranger = OwnerId {
            index: 2,
            generation: 8,
        };
        assert!(Current.is_alive(me) && !Current.is_alive(stranger));
        // Those without a supervisor are known beside it.
        assert!(Current.is_alive(solo));
        assert!(Current.recheck_every(solo).is_some());

        // SAFETY: as above.
        unsafe { install(counting()) };
        assert_eq!(Current.me().index, 1, "of the new owners");
        uninstall();
        assert!(!standing.holds());
        assert_eq!(Current.me(), solo);
        assert!(Standing::now().holds());
    }

    #[test]
    fn epoch_is_the_same_in_all_threads() {
        let here = fork_epoch();
        assert_ne!(here, 0);
        let threads = [(); 4].map(|()| std::thread::spawn(fork_epoch));
        assert!(
            threads
                .into_iter()
                .all(|thread| thread.join().unwrap() == here)
        );
    }
}

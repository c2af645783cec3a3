//! The table of shared values: a root for each, which says whether the value lives, and how many handles it has.
//!
//! **Protocol.** A root's *word* is `generation << 32 | state`, and is the truth. Its *owner* says who is changing it, so that a
//! change that will not be finished can be told from one that will.
//!
//! | word | owner | means | its owner died |
//! |---|---|---|---|
//! | g, 0 | none | free | – |
//! | g, 0 | somebody | a value is being made: its block is in `value`, once there is one | the next to take the root counts g up, for the dead one may have told it, and frees the block; what the value owns in other blocks is lost |
//! | g, n | none, or the maker for a moment | the value lives, and has n handles | nothing is in doubt |
//! | g, dropping | somebody | the last handle is gone; that one drops the value | *half-dropped*: the value and what it owns stay allocated until the heap is gone; listed as such |
//! | g, dropping, no `value` | somebody | the value is dropped, its block freed | the root is freed when free ones are looked for |
//!
//! Of the n handles, `in_messages` says how many are on their way and nobody's: whoever sends adds one to n first and to
//! `in_messages` then, whoever receives takes it from there. Dead in between, they have a handle of n, like others that die.
//!
//! * Make: find a free root, claim it by CAS of the owner, allocate, store the block, write the value, store (g, 1).
//! * Handle: CAS n → n + 1 if the generation is the one that is known and n is not 0. So a descriptor that is too old finds out.
//! * Drop: CAS n → n − 1; the last one: CAS 1 → dropping, which only one can do. Then: owner := me, drop in place, `value` := 0, free
//!   the block, store (g + 1, 0), owner := none.
//! * Free roots are found by hints: a bit for each root that may be free. A bit that is missing is found again when all others are
//!   used up, before the table grows; one too many is found out by the claim.
//!
//! The table is a directory of chunks, each twice as long as the one before. Roots stay where they are and are never freed.
//!
//! **Invariants.**
//! 1. A root's memory is a root for ever, at its address; so is a chunk's and the directory's. What is stored of an
//!    address there is 0 or final.
//! 2. The value is only touched by holders of handles, and by the one that changed the word to dropping.
//! 3. The generation grows with each value, and a root whose generation cannot grow any more is not used again.
//! 4. A block is freed by whoever swapped its address out of `value`: once.
//! 5. While a generation lives, `in_messages` of that generation is no more than n; so what is taken from there is a handle.
//! 6. A claim of a root whose word turns out not to be (g, 0), or whose owner changed since, is given back; so a claim
//!    that holds is the only one.
//!
//! **If a process dies here.** The table above; besides, a block that was allocated and not yet stored is lost. The
//! handles of a process that is killed keep counting: its values live until the heap is gone.
//!
//! # Safety
//!
//! References to roots, chunks and the directory are `'static`: their memory is never freed, stays mapped until the process ends,
//! is made of atomics, and is zeroed before its address is published.

#![allow(unsafe_code)]

use crate::error::{Corrupt, Error, Result};
use crate::heap::HeapRef;
use crate::safe::ShmSafe;
use netmcore_sem::{Current, OwnerId, Owners};
use netmcore_sys::crash_point;
use std::alloc::Layout;
use std::any::{TypeId, type_name};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Which of the heap's anchors holds the address of the directory.
const ANCHOR: usize = 0;
const MAGIC: u64 = u64::from_be_bytes(*b"nmroots1");
/// Roots of the first chunk, and bits of a word of hints.
const FIRST_CHUNK: usize = 64;
const MAX_CHUNKS: usize = 24;
pub(super) const NAME_BUCKETS: usize = 64;
/// More handles than this are a bug, as with std's `Arc`.
const MAX_HANDLES: u32 = 1 << 30;
const DROPPING: u32 = u32::MAX;
/// The generation of a root that is not used any more.
const WORN_OUT: u32 = u32::MAX;
const LABEL_BYTES: usize = 64;

/// What stands for a value; see the module. 128 bytes.
#[repr(C, align(64))]
pub(super) struct Root {
    word: AtomicU64,
    owner: AtomicU64,
    value: AtomicU64,
    size: AtomicU64,
    align: AtomicU32,
    index: AtomicU32,
    heap: AtomicU64,
    type_hash: AtomicU64,
    /// `generation << 32 | handles that belong to messages`: so many of those in the word nobody has, and may be taken.
    in_messages: AtomicU64,
    /// The type's name without paths, as far as it fits; zeros behind.
    label: [AtomicU64; LABEL_BYTES / 8],
}

const _: () = assert!(size_of::<Root>() == 128);

#[repr(C)]
struct Directory {
    magic: AtomicU64,
    /// A count of changes, and below it: no word of hints before this one has a bit. Only a hint itself.
    search_from: AtomicU64,
    /// Chunk k: `FIRST_CHUNK << k` roots, and behind them their hints. 0 if not made.
    chunks: [AtomicU64; MAX_CHUNKS],
    names: [AtomicU64; NAME_BUCKETS],
}

/// Names a root and the value that was in it at one time. Not 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct RootId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

impl RootId {
    /// In one word, which is not 0.
    pub(super) fn to_word(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index + 1)
    }

    pub(super) fn from_word(word: u64) -> Option<RootId> {
        Some(RootId {
            index: (word as u32).checked_sub(1)?,
            generation: (word >> 32) as u32,
        })
    }
}

/// What is known of a shared value, for lists and for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootInfo {
    /// Its number in the heap's table.
    pub index: u32,
    /// How often the number was used before.
    pub generation: u32,
    /// What has become of it.
    pub state: RootState,
    /// The type without paths; a long one is cut off.
    pub type_name: String,
    /// The size of the value itself, without what it owns.
    pub size_bytes: u64,
}

/// The state of a shared value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootState {
    /// It lives, and has so many handles, those of killed processes included.
    Alive {
        /// How many.
        handle_count: u32,
    },
    /// It is being made.
    Making {
        /// By whom.
        by: OwnerId,
    },
    /// Its maker died. The place is used again.
    HalfMade {
        /// Who it was.
        by: OwnerId,
    },
    /// Its last handle was dropped just now.
    Dropping,
    /// The one that dropped it died meanwhile: it stays allocated, and what it owns, until the heap is gone.
    HalfDropped {
        /// Who it was, if it came so far as to say so.
        by: Option<OwnerId>,
    },
}

fn pack(generation: u32, state: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(state)
}

fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

fn owner_word(owner: OwnerId) -> u64 {
    u64::from(owner.generation) << 32 | u64::from(owner.index + 1)
}

fn owner_of(word: u64) -> Option<OwnerId> {
    Some(OwnerId {
        index: (word as u32).checked_sub(1)?,
        generation: (word >> 32) as u32,
    })
}

fn is_dead(owner: u64) -> bool {
    owner_of(owner).is_some_and(|owner| !Current.is_alive(owner))
}

/// The same in all processes of one image.
pub(super) fn type_hash<T: 'static>() -> u64 {
    let mut hasher = DefaultHasher::new();
    TypeId::of::<T>().hash(&mut hasher);
    type_name::<T>().hash(&mut hasher);
    (size_of::<T>(), align_of::<T>()).hash(&mut hasher);
    hasher.finish()
}

/// `type_name` without the paths.
fn label<T>() -> String {
    let mut label = String::new();
    let mut rest = type_name::<T>();
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    while let Some(first) = rest.chars().next() {
        let len = match rest.find(|c| !is_path(c)) {
            Some(0) => first.len_utf8(),
            Some(len) => len,
            None => rest.len(),
        };
        let (token, behind) = rest.split_at(len);
        label.push_str(token.rsplit("::").next().unwrap_or(token));
        rest = behind;
    }
    label
}

/// A block is at least one byte, so that it has an address of its own.
fn block_layout(size: usize, align: usize) -> Option<Layout> {
    Layout::from_size_align(size.max(1), align).ok()
}

/// A value that has its place and no handle yet. Dropped, it gives the place back; the value is then forgotten.
pub(super) struct Unborn<T> {
    root: &'static Root,
    generation: u32,
    me: u64,
    not_send: PhantomData<*mut T>,
}

impl<T: ShmSafe> Unborn<T> {
    /// Puts the value into a new block of the heap.
    pub(super) fn make(heap: HeapRef, value: T) -> Result<Unborn<T>> {
        heap.check(&value)?;
        let directory = Directory::of_or_new(heap)?;
        let me = owner_word(Current.me());
        let (root, generation) = directory.take(heap, me)?;
        let unborn = Unborn {
            root,
            generation,
            me,
            not_send: PhantomData,
        };
        crash_point!("shm.arc.claimed");
        let layout = block_layout(size_of::<T>(), align_of::<T>())
            .expect("a type with alignment has a layout");
        let block = heap.allocate(layout)?;
        crash_point!("shm.arc.allocated");
        root.size.store(size_of::<T>() as u64, SeqCst);
        root.align.store(align_of::<T>() as u32, SeqCst);
        root.heap.store(heap.address() as u64, SeqCst);
        root.value
            .store(block.as_ptr().expose_provenance() as u64, SeqCst);
        crash_point!("shm.arc.block_known");
        // SAFETY: in bounds and aligned: allocated with the layout of T; here and there: nobody else has the address but
        // those who would free it after our death.
        unsafe { block.cast::<T>().write(value) };
        root.type_hash.store(type_hash::<T>(), SeqCst);
        root.set_label(&label::<T>());
        crash_point!("shm.arc.written");
        Ok(unborn)
    }

    pub(super) fn id(&self) -> RootId {
        RootId {
            index: self.root.index.load(SeqCst),
            generation: self.generation,
        }
    }

    /// Makes the value live, with so many handles. This is the commit.
    pub(super) fn bear(self, handle_count: u32) -> Held<T> {
        let (root, generation, me) = (self.root, self.generation, self.me);
        std::mem::forget(self);
        root.word.store(pack(generation, handle_count), SeqCst);
        crash_point!("shm.arc.committed");
        // Not if somebody drops it already.
        let _ = root.owner.compare_exchange(me, 0, SeqCst, SeqCst);
        Held {
            root,
            generation,
            value: root.value_at().cast(),
        }
    }
}

impl<T> Drop for Unborn<T> {
    fn drop(&mut self) {
        self.root.free_block();
        let _ = self.root.owner.compare_exchange(self.me, 0, SeqCst, SeqCst);
        self.root.hint_that_free();
    }
}

/// What a handle holds: one count of a living value. A plain copy: whoever has it answers for the count.
pub(super) struct Held<T> {
    pub(super) root: &'static Root,
    pub(super) generation: u32,
    pub(super) value: NonNull<T>,
}

impl<T: ShmSafe> Held<T> {
    /// Takes a count of the value that the id names, if it lives and is a `T`.
    pub(super) fn acquire(heap: HeapRef, id: RootId) -> Result<Held<T>> {
        Held::find(heap, id, |root| root.add_handle_if_alive(id.generation))
    }

    /// The same, and the count is one that a message had, if one had any.
    pub(super) fn take(heap: HeapRef, id: RootId) -> Result<Held<T>> {
        Held::find(heap, id, |root| {
            root.take_handle(id.generation) || root.add_handle_if_alive(id.generation)
        })
    }

    fn find(heap: HeapRef, id: RootId, count: impl FnOnce(&Root) -> bool) -> Result<Held<T>> {
        let gone = || Error::Gone {
            type_name: type_name::<T>(),
            index: id.index,
        };
        let directory = Directory::of(heap)?.ok_or_else(gone)?;
        let root = directory.root(id.index).ok_or_else(gone)?;
        // The type is that of the generation, if the value lives before it is read and after.
        if !root.is_alive(id.generation) {
            return Err(gone());
        }
        if root.type_hash.load(SeqCst) != type_hash::<T>() {
            let found = root.label();
            return Err(if root.is_alive(id.generation) {
                Error::TypeMismatch {
                    expected: type_name::<T>(),
                    found,
                }
            } else {
                gone()
            });
        }
        if !count(root) {
            return Err(gone());
        }
        crash_point!("shm.arc.acquired");
        Ok(Held {
            root,
            generation: id.generation,
            value: root.value_at().cast(),
        })
    }
}

impl Root {
    pub(super) fn index(&self) -> u32 {
        self.index.load(SeqCst)
    }

    pub(super) fn handle_count(&self) -> u32 {
        unpack(self.word.load(SeqCst)).1
    }

    fn value_at(&self) -> NonNull<u8> {
        let at = ptr::with_exposed_provenance_mut(self.value.load(SeqCst) as usize);
        NonNull::new(at).expect("a value that lives has a block")
    }

    /// Gives a handle that the caller has to a message.
    pub(super) fn leave_handle(&self, generation: u32) {
        crash_point!("shm.arc.leaving");
        let one_more = |word| {
            let (of, count) = unpack(word);
            let count = if of == generation { count } else { 0 };
            Some(pack(generation, count + 1))
        };
        // It never fails.
        let _ = self.in_messages.fetch_update(SeqCst, SeqCst, one_more);
        crash_point!("shm.arc.left");
    }

    /// Takes a handle that a message had. The value lives then.
    pub(super) fn take_handle(&self, generation: u32) -> bool {
        let one_less = |word| {
            let (of, count) = unpack(word);
            (of == generation && count > 0).then(|| pack(generation, count - 1))
        };
        let taken = self.in_messages.fetch_update(SeqCst, SeqCst, one_less);
        crash_point!("shm.arc.taken");
        taken.is_ok()
    }

    /// For holders of a handle.
    pub(super) fn add_handle(&self) {
        let (_, count) = unpack(self.word.fetch_add(1, SeqCst));
        if count >= MAX_HANDLES {
            // As std's Arc does: going on would end in a use after free.
            std::process::abort();
        }
    }

    /// For those who have no handle, but know the generation.
    pub(super) fn add_handle_if_alive(&self, generation: u32) -> bool {
        let alive = |word| {
            let (found, count) = unpack(word);
            (found == generation && count != 0 && count < MAX_HANDLES).then_some(word + 1)
        };
        self.word.fetch_update(SeqCst, SeqCst, alive).is_ok()
    }

    fn is_alive(&self, generation: u32) -> bool {
        let (found, count) = unpack(self.word.load(SeqCst));
        found == generation && (1..=MAX_HANDLES).contains(&count)
    }

    /// Gives a handle back, and drops the value if it was the last.
    ///
    /// # Safety
    ///
    /// - The caller has a handle of a value of type `T` here, and uses neither any more.
    pub(super) unsafe fn remove_handle<T>(&'static self) {
        let mut word = self.word.load(SeqCst);
        loop {
            let (generation, count) = unpack(word);
            if !(1..=MAX_HANDLES).contains(&count) {
                debug_assert!(false, "a handle of a value that does not live: {word:#x}");
                return;
            }
            let last = count == 1;
            let next = if last {
                pack(generation, DROPPING)
            } else {
                word - 1
            };
            match self.word.compare_exchange(word, next, SeqCst, SeqCst) {
                Err(found) => word = found,
                Ok(_) if !last => return,
                Ok(_) => break,
            }
        }
        crash_point!("shm.arc.dropping");
        let end = Dropping::begin(self);
        // SAFETY: the value lives, and is ours alone (invariant 2); it is dropped once, since the word allows one to come here.
        unsafe { self.value_at().cast::<T>().drop_in_place() };
        crash_point!("shm.arc.dropped");
        drop(end);
    }

    /// Moves the value out if the caller's handle is the only one, which is then given back.
    ///
    /// # Safety
    ///
    /// - The caller has a handle of a value of type `T` here, and does not use it any more if there is a result.
    pub(super) unsafe fn take_value<T>(&'static self, generation: u32) -> Option<T> {
        let (only, dropping) = (pack(generation, 1), pack(generation, DROPPING));
        self.word
            .compare_exchange(only, dropping, SeqCst, SeqCst)
            .ok()?;
        crash_point!("shm.arc.taking");
        let _end = Dropping::begin(self);
        // SAFETY: the value lives and is ours alone (invariant 2); it is not used here after this.
        Some(unsafe { self.value_at().cast::<T>().read() })
    }

    /// Makes all descriptors void if the caller's handle is the only one: nobody else can get at the value then.
    pub(super) fn renew(&self, generation: u32) -> Option<u32> {
        let next = generation.checked_add(1).filter(|&next| next != WORN_OUT)?;
        self.word
            .compare_exchange(pack(generation, 1), pack(next, 1), SeqCst, SeqCst)
            .ok()?;
        Some(next)
    }

    /// Claims the root if it is free; its generation then.
    fn claim(&self, me: u64) -> Option<u32> {
        let found = self.owner.load(SeqCst);
        if found != 0 && !is_dead(found) {
            return None;
        }
        self.owner
            .compare_exchange(found, me, SeqCst, SeqCst)
            .ok()?;
        crash_point!("shm.arc.claiming");
        let (generation, state) = unpack(self.word.load(SeqCst));
        if state != 0 || generation == WORN_OUT || self.owner.load(SeqCst) != me {
            let _ = self.owner.compare_exchange(me, found, SeqCst, SeqCst);
            return None;
        }
        if found == 0 {
            return Some(generation);
        }
        // A dead maker's. A name may have the generation already: it must not find what is made now.
        let next = generation + 1;
        self.word.store(pack(next, 0), SeqCst);
        crash_point!("shm.arc.outlived");
        self.free_block();
        if next == WORN_OUT {
            let _ = self.owner.compare_exchange(me, 0, SeqCst, SeqCst);
            return None;
        }
        Some(next)
    }

    /// Frees the block, if there is one, without regard to what lies there (invariant 4).
    fn free_block(&self) {
        let at = self.value.swap(0, SeqCst);
        let Some(at) = NonNull::new(ptr::with_exposed_provenance_mut::<u8>(at as usize)) else {
            return;
        };
        crash_point!("shm.arc.block_taken");
        let (size, align) = (self.size.load(SeqCst), self.align.load(SeqCst));
        let layout = block_layout(size as usize, align as usize);
        // SAFETY: the heap is mapped where its roots are.
        let heap = unsafe { HeapRef::from_address(self.heap.load(SeqCst) as usize) };
        if let (Some(layout), Some(heap)) = (layout, heap) {
            // SAFETY: `make` allocated it there with this layout; it was in `value`, so nobody has freed it, and
            // no one else will.
            unsafe { heap.deallocate(at, layout) };
        }
    }

    /// Frees the root after its value; the caller is its owner.
    fn free(&self, generation: u32, me: u64) {
        self.word
            .store(pack(generation.saturating_add(1), 0), SeqCst);
        crash_point!("shm.arc.root_freed");
        let _ = self.owner.compare_exchange(me, 0, SeqCst, SeqCst);
        crash_point!("shm.arc.disowned");
        self.hint_that_free();
    }

    fn hint_that_free(&self) {
        // SAFETY: as in `free_block`.
        let heap = unsafe { HeapRef::from_address(self.heap.load(SeqCst) as usize) };
        let directory = heap.and_then(|heap| Directory::of(heap).ok().flatten());
        if let Some(directory) = directory {
            directory.hint_that_free(self.index() as usize);
        }
    }

    fn set_label(&self, text: &str) {
        let mut bytes = [0; LABEL_BYTES];
        let fits = |&len: &usize| text.is_char_boundary(len);
        let len = (0..=text.len().min(LABEL_BYTES))
            .rev()
            .find(fits)
            .unwrap_or(0);
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        for (word, bytes) in self.label.iter().zip(bytes.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), SeqCst);
        }
    }

    pub(super) fn label(&self) -> String {
        let bytes: Vec<u8> = self
            .label
            .iter()
            .flat_map(|word| word.load(SeqCst).to_ne_bytes())
            .take_while(|&byte| byte != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What is known of it; `None` if it is free.
    fn info(&self) -> Option<RootInfo> {
        let owner = self.owner.load(SeqCst);
        let (generation, state) = unpack(self.word.load(SeqCst));
        let value = self.value.load(SeqCst);
        let state = match (state, owner_of(owner)) {
            (0, None) => return None,
            (0, Some(by)) if !is_dead(owner) => RootState::Making { by },
            (0, Some(_)) if value == 0 => return None,
            (0, Some(by)) => RootState::HalfMade { by },
            (DROPPING, _) if value == 0 => return None,
            (DROPPING, None) => RootState::HalfDropped { by: None },
            (DROPPING, by) if is_dead(owner) => RootState::HalfDropped { by },
            (DROPPING, _) => RootState::Dropping,
            (handle_count, _) => RootState::Alive { handle_count },
        };
        Some(RootInfo {
            index: self.index(),
            generation,
            state,
            type_name: self.label(),
            size_bytes: self.size.load(SeqCst),
        })
    }
}

/// The end of a value, in this process's hands. Dropped, when the value is, it frees the block and the root.
struct Dropping {
    root: &'static Root,
    me: u64,
}

impl Dropping {
    fn begin(root: &'static Root) -> Dropping {
        let me = owner_word(Current.me());
        // Over a claim that is about to be given back (invariant 6), or a dead maker.
        root.owner.store(me, SeqCst);
        crash_point!("shm.arc.drop_owned");
        Dropping { root, me }
    }
}

impl Drop for Dropping {
    fn drop(&mut self) {
        self.root.free_block();
        crash_point!("shm.arc.block_freed");
        let (generation, _) = unpack(self.root.word.load(SeqCst));
        self.root.free(generation, self.me);
    }
}

impl Directory {
    /// The heap's directory, if it has one yet.
    fn of(heap: HeapRef) -> Result<Option<&'static Directory>> {
        let at = heap.anchors()[ANCHOR].load(SeqCst);
        if at == 0 {
            return Ok(None);
        }
        // SAFETY: it was published by `of_or_new` (invariant 1).
        let directory = unsafe { published::<Directory>(at) };
        let found = directory.magic.load(SeqCst);
        if found == MAGIC {
            Ok(Some(directory))
        } else {
            Err(Error::FormatMismatch {
                object: "the table of shared values".to_owned(),
                expected: MAGIC,
                found,
            })
        }
    }

    fn of_or_new(heap: HeapRef) -> Result<&'static Directory> {
        if let Some(directory) = Directory::of(heap)? {
            return Ok(directory);
        }
        let at = zeroed(heap, Layout::new::<Directory>())?;
        crash_point!("shm.arc.directory_allocated");
        // SAFETY: zeroed memory of its layout is a directory, and it is ours until it is published.
        let directory = unsafe { published::<Directory>(at.as_ptr().expose_provenance() as u64) };
        directory.magic.store(MAGIC, SeqCst);
        // SAFETY: allocated just now with this layout, and not published if this is called.
        let undo = || unsafe { heap.deallocate(at, Layout::new::<Directory>()) };
        publish(&heap.anchors()[ANCHOR], at, undo);
        crash_point!("shm.arc.directory_made");
        Directory::of(heap)?.ok_or(Error::Corrupt(Corrupt {
            object: "the heap".to_owned(),
            offset: 0,
            invariant: "an anchor that was set is not 0".to_owned(),
        }))
    }

    /// How many chunks there are.
    fn chunk_count(&self) -> usize {
        let made = |chunk: &&AtomicU64| chunk.load(SeqCst) != 0;
        self.chunks.iter().take_while(made).count()
    }

    fn root(&self, index: u32) -> Option<&'static Root> {
        let (chunk, place) = chunk_of(index as usize);
        let at = self.chunks.get(chunk)?.load(SeqCst);
        if at == 0 {
            return None;
        }
        // SAFETY: published by `grow` (invariant 1), and the place is below the chunk's length.
        Some(unsafe { published::<Root>(at + (place * size_of::<Root>()) as u64) })
    }

    /// The word with the hints for the 64 roots from `64 * number` on.
    fn hints(&self, number: usize) -> Option<&'static AtomicU64> {
        let (chunk, place) = chunk_of(number * FIRST_CHUNK);
        let at = self.chunks.get(chunk)?.load(SeqCst);
        if at == 0 {
            return None;
        }
        let offset = (FIRST_CHUNK << chunk) * size_of::<Root>() + place / FIRST_CHUNK * 8;
        // SAFETY: as for `root`: the hints lie behind the roots.
        Some(unsafe { published::<AtomicU64>(at + offset as u64) })
    }

    /// A free root, claimed.
    fn take(&self, heap: HeapRef, me: u64) -> Result<(&'static Root, u32)> {
        loop {
            let seen = self.search_from.load(SeqCst);
            let mut number = unpack(seen).1 as usize;
            while let Some(hints) = self.hints(number) {
                let bits = hints.load(SeqCst);
                if bits == 0 {
                    number += 1;
                    continue;
                }
                let bit = bits.trailing_zeros();
                if hints.fetch_and(!(1 << bit), SeqCst) & (1 << bit) == 0 {
                    continue;
                }
                crash_point!("shm.arc.hint_taken");
                let index = number * FIRST_CHUNK + bit as usize;
                let Some(root) = self.root(index as u32) else {
                    continue;
                };
                if let Some(generation) = root.claim(me) {
                    self.search_on(seen, number);
                    return Ok((root, generation));
                }
            }
            if self.search_on(seen, number) && self.find_missed() == 0 {
                self.grow(heap)?;
            }
        }
    }

    /// Lets the next search begin at `number`; false if a root was freed since `seen`.
    fn search_on(&self, seen: u64, number: usize) -> bool {
        let (changes, from) = unpack(seen);
        let next = pack(changes.wrapping_add(1), number as u32);
        from as usize == number
            || self
                .search_from
                .compare_exchange(seen, next, SeqCst, SeqCst)
                .is_ok()
    }

    fn hint_that_free(&self, index: usize) {
        let number = index / FIRST_CHUNK;
        let Some(hints) = self.hints(number) else {
            return;
        };
        hints.fetch_or(1 << (index % FIRST_CHUNK), SeqCst);
        crash_point!("shm.arc.hinted");
        let earlier = |seen| {
            let (changes, from) = unpack(seen);
            Some(pack(changes.wrapping_add(1), from.min(number as u32)))
        };
        let _ = self.search_from.fetch_update(SeqCst, SeqCst, earlier);
    }

    /// Finds free roots without a hint, and frees those whose dropper died at the very end. How many.
    fn find_missed(&self) -> usize {
        let mut found = 0;
        for root in self.roots() {
            let owner = root.owner.load(SeqCst);
            let (generation, state) = unpack(root.word.load(SeqCst));
            let index = root.index() as usize;
            if state == 0 && generation != WORN_OUT && (owner == 0 || is_dead(owner)) {
                self.hint_that_free(index);
                found += 1;
            } else if state == DROPPING && root.value.load(SeqCst) == 0 && is_dead(owner) {
                let me = owner_word(Current.me());
                let taken = root.owner.compare_exchange(owner, me, SeqCst, SeqCst);
                if taken.is_ok() {
                    crash_point!("shm.arc.taken_over");
                    if root.word.load(SeqCst) == pack(generation, DROPPING) {
                        root.free(generation, me);
                        found += 1;
                    } else {
                        let _ = root.owner.compare_exchange(me, 0, SeqCst, SeqCst);
                    }
                }
            }
        }
        found
    }

    /// Adds a chunk, if nobody else does.
    fn grow(&self, heap: HeapRef) -> Result<()> {
        let chunk = self.chunk_count();
        let Some(slot) = self.chunks.get(chunk) else {
            return Err(Error::OutOfPoolMemory {
                wanted_bytes: size_of::<Root>() as u64,
                free_bytes: 0,
                largest_free_bytes: 0,
            });
        };
        let root_count = FIRST_CHUNK << chunk;
        let roots_bytes = root_count * size_of::<Root>();
        let layout = Layout::from_size_align(roots_bytes + root_count / 8, align_of::<Root>())
            .expect("a chunk is far below the largest layout");
        let at = zeroed(heap, layout)?;
        crash_point!("shm.arc.chunk_allocated");
        for place in 0..root_count {
            // SAFETY: in bounds, zeroed, and not published yet.
            let root = unsafe { &*at.as_ptr().cast::<Root>().add(place) };
            let index = (FIRST_CHUNK << chunk) - FIRST_CHUNK + place;
            root.index.store(index as u32, SeqCst);
            root.heap.store(heap.address() as u64, SeqCst);
        }
        // SAFETY: in bounds: the hints lie behind the roots, a bit for each; not published yet.
        unsafe {
            at.as_ptr()
                .add(roots_bytes)
                .write_bytes(0xff, root_count / 8)
        };
        // SAFETY: allocated just now with this layout, and not published if this is called.
        let undo = || unsafe { heap.deallocate(at, layout) };
        publish(slot, at, undo);
        crash_point!("shm.arc.chunk_made");
        Ok(())
    }

    fn roots(&self) -> impl Iterator<Item = &'static Root> {
        let count = (FIRST_CHUNK << self.chunk_count()) - FIRST_CHUNK;
        (0..count as u32).filter_map(|index| self.root(index))
    }
}

/// The chunk with the root of that index, and its place there.
fn chunk_of(index: usize) -> (usize, usize) {
    let chunk = (index / FIRST_CHUNK + 1).ilog2() as usize;
    (chunk, index + FIRST_CHUNK - (FIRST_CHUNK << chunk))
}

/// Allocates memory of zeros.
pub(super) fn zeroed(heap: HeapRef, layout: Layout) -> Result<NonNull<u8>> {
    let at = heap.allocate(layout)?;
    // SAFETY: so long, and ours.
    unsafe { at.write_bytes(0, layout.size()) };
    Ok(at)
}

/// Stores the address of new memory where there is none yet; if somebody was quicker, the memory is not needed.
fn publish(slot: &AtomicU64, at: NonNull<u8>, undo: impl FnOnce()) {
    let address = at.as_ptr().expose_provenance() as u64;
    if slot.compare_exchange(0, address, SeqCst, SeqCst).is_err() {
        undo();
    }
}

/// What lies at an address that was published.
///
/// # Safety
///
/// - It is the address of a `T` that was published (invariant 1), or is about to be, and the heap is mapped. `T` is made of atomics.
pub(super) unsafe fn published<T>(at: u64) -> &'static T {
    // SAFETY: the caller's duty.
    unsafe { &*ptr::with_exposed_provenance::<T>(at as usize) }
}

/// The heads of the lists of names, made if need be.
pub(super) fn name_buckets(heap: HeapRef) -> Result<&'static [AtomicU64; NAME_BUCKETS]> {
    Ok(&Directory::of_or_new(heap)?.names)
}

/// The type of the value that the id names, if it lives.
pub(super) fn label_of(heap: HeapRef, id: RootId) -> Result<Option<String>> {
    let directory = Directory::of(heap)?;
    let root = directory.and_then(|directory| directory.root(id.index));
    Ok(root
        .map(|root| (root.label(), root))
        .filter(|(_, root)| root.is_alive(id.generation))
        .map(|(label, _)| label))
}

/// All shared values of the heap.
pub(super) fn list(heap: HeapRef) -> Result<Vec<RootInfo>> {
    let directory = Directory::of(heap)?;
    Ok(directory
        .into_iter()
        .flat_map(Directory::roots)
        .filter_map(Root::info)
        .collect())
}

/// Checks what holds whatever process dies.
pub(crate) fn verify(heap: HeapRef) -> Result<()> {
    let broken = |index: usize, address: u64, invariant: &str| {
        Error::Corrupt(Corrupt {
            object: format!("shared value {index}"),
            offset: address.wrapping_sub(heap.address() as u64),
            invariant: invariant.to_owned(),
        })
    };
    let Some(directory) = Directory::of(heap)? else {
        return Ok(());
    };
    for (index, root) in directory.roots().enumerate() {
        let (_, state) = unpack(root.word.load(SeqCst));
        let value = root.value.load(SeqCst);
        if root.index() as usize != index || root.heap.load(SeqCst) != heap.address() as u64 {
            return Err(broken(index, value, "a root knows its place"));
        }
        if state != DROPPING && state > MAX_HANDLES {
            return Err(broken(index, value, "so many handles cannot be"));
        }
        if state != 0 && state != DROPPING && value == 0 {
            return Err(broken(index, value, "a value that lives has a block"));
        }
        if value != 0 && !heap.contains(ptr::without_provenance(value as usize)) {
            return Err(broken(index, value, "values lie in the heap of their root"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_no_paths() {
        assert_eq!(
            label::<Option<std::sync::Arc<[u8; 4]>>>(),
            "Option<Arc<[u8; 4]>>"
        );
        assert_eq!(label::<(u8, std::time::Duration)>(), "(u8, Duration)");
    }

    #[test]
    fn every_index_has_one_place() {
        let mut expected = (0, 0);
        for index in 0..10_000 {
            assert_eq!(chunk_of(index), expected);
            expected.1 += 1;
            if expected.1 == FIRST_CHUNK << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn ids_and_owners_survive_their_words() {
        for (index, generation) in [(0, 0), (7, u32::MAX - 1), (u32::MAX - 1, 1)] {
            let id = RootId { index, generation };
            assert!(RootId::from_word(id.to_word()) == Some(id));
            let owner = OwnerId { index, generation };
            assert_eq!(owner_of(owner_word(owner)), Some(owner));
        }
        assert!(RootId::from_word(0).is_none());
    }

    #[test]
    fn types_have_hashes_of_their_own() {
        assert_eq!(type_hash::<u64>(), type_hash::<u64>());
        assert_ne!(type_hash::<u64>(), type_hash::<i64>());
    }
}

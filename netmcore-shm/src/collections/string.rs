//! Text in the heap with one owner: [`ShmString`].
//!
//! **Protocol.** It is a [`ShmVec`] of bytes.
//!
//! **Invariants.**
//! 1. The bytes are UTF-8. Each change of them is made by one commit of the vector, which leaves them so.
//!
//! **If a process dies here.** As for the vector: the text is as before the call or after it.
//!
//! # Safety
//!
//! Text is made of bytes without a check, by invariant 1.

#![allow(unsafe_code)]

use super::vec::ShmVec;
use crate::error::Result;
use crate::heap::HeapRef;
use crate::safe::ShmSafe;
use std::borrow::{Borrow, Cow};
use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::path::Path;
use std::str;

/// Text in shared memory with one owner: what std's `String` is in private memory.
///
/// It is changed through `&mut`: under a lock, or before it is shared. It hashes and compares as `str` does, so it is found in a map by a `&str`.
///
/// **Fork.** As for [`ShmVec`].
///
/// # If a process dies
///
/// The text lies in shared memory: it is as it was before the call or after it.
///
/// ```
/// use netmcore_shm::{Arena, Heap, ShmString};
/// use std::fmt::Write;
///
/// let arena = Arena::reserve(1 << 30)?;
/// let heap = Heap::anonymous(&arena, 64 << 20)?;
/// let mut text = ShmString::from_str_in(&heap, "six times seven")?;
/// write!(text, " is {}", 42).unwrap();
/// assert_eq!(text, "six times seven is 42");
/// assert_eq!(text.pop(), Some('2'));
/// assert!(std::panic::catch_unwind(|| ShmString::new_in(&heap).insert_str(1, "no such place")).is_err());
/// # Ok::<(), netmcore_shm::Error>(())
/// ```
pub struct ShmString {
    bytes: ShmVec<u8>,
}

// SAFETY: a vector, which is ShmSafe and reports its block.
unsafe impl ShmSafe for ShmString {
    const HAS_POINTERS: bool = true;

    fn visit_pointers(&self, visit: &mut dyn FnMut(*const u8)) {
        self.bytes.visit_pointers(visit);
    }
}

impl ShmString {
    /// An empty text, which has no block yet.
    pub fn new_in(heap: impl Into<HeapRef>) -> ShmString {
        ShmString {
            bytes: ShmVec::new_in(heap),
        }
    }

    /// An empty text with room for `capacity` bytes.
    ///
    /// # Errors
    ///
    /// [`OutOfPoolMemory`](crate::Error::OutOfPoolMemory) and [`NoSpace`](crate::Error::NoSpace) if there is no memory.
    pub fn with_capacity_in(heap: impl Into<HeapRef>, capacity: usize) -> Result<ShmString> {
        Ok(ShmString {
            bytes: ShmVec::with_capacity_in(heap, capacity)?,
        })
    }

    /// A copy of the text.
    ///
    /// # Errors
    ///
    /// As [`with_capacity_in`](Self::with_capacity_in).
    pub fn from_str_in(heap: impl Into<HeapRef>, text: &str) -> Result<ShmString> {
        let mut bytes = ShmVec::with_capacity_in(heap, text.len())?;
        bytes.extend_from_slice(text.as_bytes())?;
        Ok(ShmString { bytes })
    }

    /// The text of all the pieces.
    ///
    /// # Errors
    ///
    /// As [`with_capacity_in`](Self::with_capacity_in).
    pub fn from_iter_in<S: AsRef<str>>(
        heap: impl Into<HeapRef>,
        pieces: impl IntoIterator<Item = S>,
    ) -> Result<ShmString> {
        let mut text = ShmString::new_in(heap);
        text.try_extend(pieces)?;
        Ok(text)
    }

    /// The bytes as text, if they are UTF-8; else the bytes.
    ///
    /// # Errors
    ///
    /// The bytes.
    pub fn from_utf8(bytes: ShmVec<u8>) -> std::result::Result<ShmString, ShmVec<u8>> {
        match str::from_utf8(&bytes) {
            Ok(_) => Ok(ShmString { bytes }),
            Err(_) => Err(bytes),
        }
    }

    /// The bytes, in the same block.
    pub fn into_bytes(self) -> ShmVec<u8> {
        self.bytes
    }

    /// A copy of the text, in the same heap.
    ///
    /// # Errors
    ///
    /// As [`with_capacity_in`](Self::with_capacity_in).
    pub fn try_clone(&self) -> Result<ShmString> {
        ShmString::from_str_in(self.bytes.heap(), self)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        self
    }

    /// How many bytes there may be before a new block is needed.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// The heap that the text lies in.
    pub fn heap(&self) -> HeapRef {
        self.bytes.heap()
    }

    /// Appends a text.
    ///
    /// # Errors
    ///
    /// As [`with_capacity_in`](Self::with_capacity_in); nothing has changed.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// All of it is there, or nothing.
    pub fn push_str(&mut self, text: &str) -> Result<()> {
        self.bytes.extend_from_slice(text.as_bytes())
    }

    /// Appends a character. As [`push_str`](Self::push_str).
    ///
    /// # Errors
    ///
    /// As [`push_str`](Self::push_str).
    pub fn push(&mut self, character: char) -> Result<()> {
        self.push_str(character.encode_utf8(&mut [0; 4]))
    }

    /// Appends all the pieces, one after the other.
    ///
    /// # Errors
    ///
    /// As [`push_str`](Self::push_str); the pieces before it are there.
    ///
    /// # If a process dies
    ///
    /// The first of them are there, whole; up to all.
    pub fn try_extend<S: AsRef<str>>(&mut self, pieces: impl IntoIterator<Item = S>) -> Result<()> {
        pieces
            .into_iter()
            .try_for_each(|piece| self.push_str(piece.as_ref()))
    }

    /// Puts a text in at a place, counted in bytes: all of the text moves to a new block, unless it is at the end.
    ///
    /// # Errors
    ///
    /// As [`push_str`](Self::push_str).
    ///
    /// # Panics
    ///
    /// If there is no such place, or it lies within a character; if it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// All of it is there, or nothing.
    pub fn insert_str(&mut self, index: usize, text: &str) -> Result<()> {
        let (before, after) = self.split_at(index);
        if after.is_empty() {
            return self.push_str(text);
        }
        let new = ShmString::from_iter_in(self.heap(), [before, text, after])?;
        self.bytes.take_block_of(new.bytes);
        Ok(())
    }

    /// Takes the last character.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// The character is there, or lost with the process.
    pub fn pop(&mut self) -> Option<char> {
        let last = self.chars().next_back()?;
        self.truncate(self.len() - last.len_utf8());
        Some(last)
    }

    /// Cuts the text off at a place, counted in bytes. Does nothing if it is not longer.
    ///
    /// # Panics
    ///
    /// If the place lies within a character; if it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// It is done or not.
    pub fn truncate(&mut self, len_bytes: usize) {
        if len_bytes < self.len() {
            assert!(
                self.is_char_boundary(len_bytes),
                "byte {len_bytes} of a ShmString is within a character"
            );
            self.bytes.truncate(len_bytes);
        }
    }

    /// Removes all of the text, and keeps the block.
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    ///
    /// # If a process dies
    ///
    /// It is done or not.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Makes room for `more` bytes.
    ///
    /// # Errors
    ///
    /// As [`with_capacity_in`](Self::with_capacity_in).
    ///
    /// # Panics
    ///
    /// If it is a copy made by fork.
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        self.bytes.reserve(more)
    }
}

impl Deref for ShmString {
    type Target = str;

    fn deref(&self) -> &str {
        // SAFETY: invariant 1.
        unsafe { str::from_utf8_unchecked(&self.bytes) }
    }
}

impl AsRef<str> for ShmString {
    fn as_ref(&self) -> &str {
        self
    }
}

impl AsRef<[u8]> for ShmString {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<OsStr> for ShmString {
    fn as_ref(&self) -> &OsStr {
        self.as_str().as_ref()
    }
}

impl AsRef<Path> for ShmString {
    fn as_ref(&self) -> &Path {
        self.as_str().as_ref()
    }
}

impl Borrow<str> for ShmString {
    fn borrow(&self) -> &str {
        self
    }
}

/// Each piece is appended at once; what a `write!` gives comes in several pieces.
impl fmt::Write for ShmString {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push_str(text).map_err(|_| fmt::Error)
    }
}

impl fmt::Debug for ShmString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl fmt::Display for ShmString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl PartialEq for ShmString {
    fn eq(&self, other: &ShmString) -> bool {
        **self == **other
    }
}

impl Eq for ShmString {}

macro_rules! compares_with {
    ($($other:ty),*) => {
        $(
            impl PartialEq<$other> for ShmString {
                fn eq(&self, other: &$other) -> bool {
                    **self == **other
                }
            }

            impl PartialEq<ShmString> for $other {
                fn eq(&self, other: &ShmString) -> bool {
                    **self == **other
                }
            }
        )*
    };
}

compares_with!(&str, String, Cow<'_, str>);

impl PartialEq<str> for ShmString {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<ShmString> for str {
    fn eq(&self, other: &ShmString) -> bool {
        *self == **other
    }
}

impl PartialOrd for ShmString {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ShmString {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

/// As `str`, so that maps find it by one.
impl Hash for ShmString {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

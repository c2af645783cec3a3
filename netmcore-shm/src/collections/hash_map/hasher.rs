//! The hasher of shared maps: its keys lie in the map, so that all processes hash alike.
//!
//! ahash, with four random keys of 64 bits that are stored and given to it at each use. std's hasher keeps its keys in a variable of
//! the thread, foldhash and hashbrown's default keep half of theirs in a static one: a map in shared memory would lose its entries in
//! the next process. Of the crates that take stored keys, ahash is as fast as those on short keys, and built to
//! resist those who choose keys so that they collide; SipHash is sounder there, and costs several times as much on a word.

use crate::ShmSafe;
use netmcore_sys::process::random_u64;
use std::fmt;
use std::hash::BuildHasher;

/// Keys of a hasher that mean the same in all processes: what [`ShmHashMap`](crate::ShmHashMap) hashes with unless told otherwise.
///
/// Each one made by [`new`](Self::new) has random keys; clones hash alike.
///
/// ```
/// use netmcore_shm::hash_map::ShmRandomState;
/// use std::hash::BuildHasher;
///
/// let state = ShmRandomState::new();
/// assert_eq!(state.hash_one("key"), state.clone().hash_one("key"));
/// assert_ne!(state.hash_one("key"), ShmRandomState::new().hash_one("key"));
/// ```
#[derive(Clone, ShmSafe)]
pub struct ShmRandomState {
    keys: [u64; 4],
}

impl ShmRandomState {
    /// With random keys.
    pub fn new() -> ShmRandomState {
        ShmRandomState::with_keys(std::array::from_fn(|_| random_u64()))
    }

    /// With these keys. Who knows them can choose keys of a map that collide.
    pub fn with_keys(keys: [u64; 4]) -> ShmRandomState {
        ShmRandomState { keys }
    }
}

impl Default for ShmRandomState {
    fn default() -> ShmRandomState {
        ShmRandomState::new()
    }
}

impl BuildHasher for ShmRandomState {
    type Hasher = ahash::AHasher;

    #[inline]
    fn build_hasher(&self) -> ahash::AHasher {
        let [one, two, three, four] = self.keys;
        ahash::RandomState::with_seeds(one, two, three, four).build_hasher()
    }
}

impl fmt::Debug for ShmRandomState {
    /// Without the keys, which are a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmRandomState").finish_non_exhaustive()
    }
}

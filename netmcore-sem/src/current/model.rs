//! The owners of a model: each thread of it says who it is, and a death is a call.
//!
//! **Not here.** Anything that a program uses: [`Current`] as the other builds have it is in `current.rs`.

use crate::owner::{OwnerId, Owners, announce_death};
use crate::sync::{AtomicU32, Ordering};
use std::cell::Cell;
use std::marker::PhantomData;

const PEOPLE: usize = 4;

struct People {
    is_dead: [AtomicU32; PEOPLE],
    deaths: AtomicU32,
}

loom::lazy_static! {
    static ref ALL: People = People {
        is_dead: std::array::from_fn(|_| AtomicU32::new(0)),
        deaths: AtomicU32::new(0),
    };
}

loom::thread_local! {
    static ME: Cell<u32> = Cell::new(0);
}

/// The owners of the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Current;

/// From now on this thread acts under the index; under 0 at first.
pub fn act_as(index: u32) {
    ME.with(|me| me.set(index));
}

/// This thread is dead: it does nothing more, and the supervisor finds out.
pub fn die() {
    let people: &'static People = &ALL;
    let me = Current.me().index as usize;
    people.is_dead[me].store(1, Ordering::Release);
    announce_death(&people.deaths);
}

/// Models leak guards to die.
#[derive(Debug)]
pub struct Holding(PhantomData<*const ()>);

impl Holding {
    /// One more.
    pub fn begin() -> Holding {
        Holding(PhantomData)
    }
}

/// Models do not fork.
pub fn fork_epoch() -> u64 {
    1
}

/// Under which id a thread acts.
#[derive(Clone, Copy, Debug)]
pub struct Standing(OwnerId);

impl Standing {
    /// That of the calling thread.
    pub fn now() -> Standing {
        Standing(Current.me())
    }

    /// The id.
    pub fn id(&self) -> OwnerId {
        self.0
    }

    /// Whether the calling thread has the same id.
    pub fn holds(&self) -> bool {
        self.0 == Current.me()
    }
}

impl Owners for Current {
    fn me(&self) -> OwnerId {
        OwnerId {
            index: ME.with(Cell::get),
            generation: 1,
        }
    }

    fn is_alive(&self, owner: OwnerId) -> bool {
        let people: &'static People = &ALL;
        people.is_dead[owner.index as usize].load(Ordering::Acquire) == 0
    }

    fn deaths(&self) -> &AtomicU32 {
        let people: &'static People = &ALL;
        &people.deaths
    }
}

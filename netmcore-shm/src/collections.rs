//! Collections in shared memory: what they have in common.
//!
//! **Protocol.** A collection is a value that lies in place, in the same heap as what it owns: it is put there by
//! [`ShmArc::new_in`](crate::ShmArc::new_in) or [`Heap::named`](crate::Heap::named), or inside of another collection. Whoever has a handle uses it through
//! `&self`; the handle is serialisable, and so can be the argument of a process. What it owns is reached through addresses, which are the same
//! everywhere.
//!
//! * It is made by `new_in(heap)`, and takes a *header* of the user's type where it is made by `with_header_in(heap, header)`: `header()` gives it.
//! * Before a value is taken in, [`HeapRef::check`](crate::HeapRef::check) is asked whether its pointers lie in the same heap; the value comes back with the error.
//!   What is assigned through a `&mut` is asked when a claim ends, or by nobody: `safe` has the table.
//! * Each change is committed by one atomic store; blocks are allocated before it and freed after it. So a reader without the lock, and the next holder of a
//!   lock whose owner died, find the collection as it was before or after.
//! * Whatever waits does so on a [`WaitWord`](netmcore_sem::WaitWord) or a lock of netmcore-sem, and ends when its peers have died.
//!
//! **Invariants.**
//! 1. What is reachable from a collection lies in its heap.
//! 2. At every instant a value belongs to one owner: the collection, or the process that puts it in or takes it out.
//!
//! **If a process dies here.** A block that was allocated and not yet linked, or unlinked and not yet freed, stays allocated until the heap is
//! gone. Nothing that others can reach is lost or changed.

mod array;
mod boxed;
mod buffer;
mod cell;
mod claims;
#[cfg(not(loom))]
mod enrolment;
#[cfg(loom)]
#[allow(missing_docs, reason = "for models")]
pub mod enrolment;
mod grid;
pub mod hash_map;
pub mod mailbox;
mod matrix;
pub mod queue;
mod rejected;
mod string;
mod vec;

pub use array::{ArraySlice, ArraySliceMut, ShmArray};
pub use boxed::ShmBox;
pub use buffer::{BufferError, BufferPin, BufferReader, ShmBuffer};
pub use cell::{CellRef, NotExchanged, ShmCell};
pub use claims::ClaimError;
pub use enrolment::{Closed, ClosedBy, EnrolError};
pub use hash_map::ShmHashMap;
pub use mailbox::{Mailbox, MailboxReceiver, MailboxSender, Message};
pub use matrix::{MatrixBlock, MatrixBlockMut, ShmMatrix};
pub use queue::ShmQueue;
pub use rejected::Rejected;
pub use string::ShmString;
pub use vec::{ShmVec, ShmVecIntoIter};

/// The marker of a collection that takes values in and gives them out through `&self`, as a `Cell`: it is not one of a subtype's. Whether it may be
/// sent and shared follows from its bounds, or is said there.
type Invariant<T> = std::marker::PhantomData<fn(T) -> T>;

//! The two ends of a queue: a lock for each, and positions that are the truth.
//!
//! **Protocol.** `tail` is the position of the next element to be pushed, `head` that of the next to be popped; what lies between
//! is in the queue. Who holds the lock of an end changes its position, and nothing else of what counts.
//!
//! | step of a push | killed here |
//! |---|---|
//! | take the push end's lock | the lock is taken over; there is nothing to repair |
//! | find the segment of `tail`; perhaps link a new one behind the last | the next pusher finds it linked, or the segment was still spare or lost |
//! | write the value at `tail` | the value is not in the queue: the next pusher writes over it |
//! | store `tail` + 1: the commit | the value is in the queue |
//! | free the lock, wake one that waits for an element | the death wakes all |
//!
//! | step of a pop | killed here |
//! |---|---|
//! | take the pop end's lock | the lock is taken over; there is nothing to repair |
//! | step to the next segment if `head` is in it; retire the one before | one segment is lost until the heap is gone |
//! | copy the value at `head` | the value is still in the queue |
//! | store `head` + 1: the commit | the value is gone with the one that popped it |
//! | free the lock, wake one that waits for room | the death wakes all |
//!
//! Positions are `lap << bits | index`: segments of `per_lap` places each, numbered by laps. A bounded queue has one segment, which every lap uses
//! again; a push finds room if `tail` is less than one lap ahead of `head`. An unbounded one has a segment for each lap, linked forwards; one
//! retired segment is kept as a spare.
//!
//! Each end keeps what it saw last of the other's position, so that in a stream it reads the other's line once for many elements.
//! What it then knows to be there it has the processor fetch ahead.
//!
//! **Invariants.**
//! 1. `head` ≤ `tail`, and both only grow. An end's position is stored by the holder of its lock only.
//! 2. The places from `head` to `tail` hold values, which only the holder of the pop end's lock touches. The places
//!    outside are the pushers'.
//! 3. The push end's segment is that of `tail`, or the one before it if the last place of that one is filled. It is stored before `tail`
//!    goes into a new segment. So when an element lies in a segment, no pusher uses those before it.
//! 4. A segment is retired after the pop end has left it, and is used by nobody then: not by poppers, who have no lock, not by
//!    pushers (3).
//! 5. Once the queue is closed, which is stored under the push end's lock, `tail` grows no more.
//! 6. What an end has seen of the other's position is at most that position, at all times.
//! 7. The segments are there, but for a queue that is empty and closed by [`NO_SEGMENTS`]: nobody pushes there, nor is there anything to pop, so nobody follows
//!    their addresses.
//!
//! **Not here.** The values, the memory of segments, who may be waited for.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use netmcore_sem::{Current, LockGuard, LockWord, Owners, WaitWord};
use netmcore_sys::crash_point;
use std::time::Instant;

/// What is stored by one side and read by the other has lines of the cache to itself; processors fetch them in pairs.
#[repr(align(128))]
struct Lines<T>(T);

/// How positions count. Plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Laps {
    per_lap: u64,
    bits: u32,
    is_ring: bool,
}

impl Laps {
    /// Of a bounded queue of so many places, at least one: each lap is the same segment.
    ///
    /// # Panics
    ///
    /// If there are more than 2^48, so that positions could not count laps for ever.
    pub fn ring(places: u64) -> Laps {
        Laps::new(places, true)
    }

    /// Of an unbounded queue in segments of so many places, at least one.
    pub fn chain(places: u64) -> Laps {
        Laps::new(places, false)
    }

    fn new(per_lap: u64, is_ring: bool) -> Laps {
        assert!(per_lap > 0, "a queue without places");
        assert!(
            per_lap <= 1 << 48,
            "the capacity of a queue is larger than any memory"
        );
        let bits = per_lap.next_power_of_two().trailing_zeros();
        Laps {
            per_lap,
            bits,
            is_ring,
        }
    }

    /// Places of a segment.
    pub fn per_lap(self) -> u64 {
        self.per_lap
    }

    /// Whether it is one segment for all laps.
    pub fn is_ring(self) -> bool {
        self.is_ring
    }

    /// The place in the segment.
    #[inline]
    pub fn index(self, position: u64) -> u64 {
        position & ((1 << self.bits) - 1)
    }

    #[inline]
    fn lap(self, position: u64) -> u64 {
        position >> self.bits
    }

    /// `count` places on, which are all in the same segment.
    #[inline]
    fn advance(self, position: u64, count: u64) -> u64 {
        if self.index(position) + count == self.per_lap {
            (self.lap(position) + 1) << self.bits
        } else {
            position + count
        }
    }

    /// How many places of the segment are left from there on.
    #[inline]
    fn left_in_lap(self, position: u64) -> u64 {
        self.per_lap - self.index(position)
    }

    /// How many elements lie from one position to another.
    pub fn count(self, from: u64, to: u64) -> u64 {
        let laps = self.lap(to) - self.lap(from);
        laps * self.per_lap + self.index(to) - self.index(from)
    }
}

/// What stands before the places of a segment.
pub struct Segment {
    /// The address of the next one; 0 if there is none yet.
    next: AtomicU64,
    /// Which lap it is.
    lap: AtomicU64,
}

impl Segment {
    /// Of the first lap, the last of its chain.
    pub fn new() -> Segment {
        Segment {
            next: AtomicU64::new(0),
            lap: AtomicU64::new(0),
        }
    }

    /// The segment behind it.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }
}

impl Default for Segment {
    fn default() -> Segment {
        Segment::new()
    }
}

/// Where segments lie. Their addresses are not 0.
pub trait Segments {
    /// What stands before the places of the segment.
    fn segment(&self, address: u64) -> &Segment;

    /// Frees a segment that nobody uses.
    fn retire(&self, address: u64);
}

/// One end: its lock, and what its holder keeps.
struct End {
    lock: LockWord,
    /// The other end's position as last seen from here.
    seen: AtomicU64,
    /// The segment of this end's position; invariant 3 says when it lags behind.
    segment: AtomicU64,
}

impl End {
    fn new(segment: u64) -> End {
        End {
            lock: LockWord::new(),
            seen: AtomicU64::new(0),
            segment: AtomicU64::new(segment),
        }
    }

    /// Takes the lock, from a dead owner as from a living one: `None` if the deadline passes.
    #[inline]
    fn take(&self, deadline: Option<Instant>) -> Option<LockGuard<'_>> {
        if self.lock.owner().is_some() {
            self.refuse_holder();
        }
        match deadline {
            None => Some(match self.lock.lock(&Current) {
                Ok(guard) => guard,
                Err(died) => died.guard,
            }),
            Some(deadline) => match self.lock.lock_deadline(&Current, deadline) {
                Ok(guard) => Some(guard),
                Err(error) => error.into_guard(),
            },
        }
    }

    #[cold]
    fn refuse_holder(&self) {
        assert!(
            self.lock.owner() != Some(Current.me()),
            "a thread that looks at the elements of a queue cannot take from it (or look) a second time"
        );
    }
}

/// Orders the store of a position before the look whether somebody sleeps, as a fence that is sequentially consistent does.
///
/// Between the two the lock was freed. On x86-64 that is a locked instruction, which is such a fence itself; a second one would make a push a third
/// dearer. The compiler is told to keep the order.
#[inline]
fn barrier_after_unlock() {
    if cfg!(all(target_arch = "x86_64", not(loom))) {
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// Why a queue is closed.
pub const CLOSED_BY_CALL: u32 = 1;
/// As above.
pub const PRODUCERS_GONE: u32 = 2;
/// As above.
pub const CONSUMERS_GONE: u32 = 4;
/// The queue is being dropped, or who dropped it died.
pub const NO_SEGMENTS: u32 = 8;

/// See the module.
#[repr(C)]
pub struct Ends {
    push: Lines<End>,
    tail: Lines<AtomicU64>,
    pop: Lines<End>,
    head: Lines<AtomicU64>,
    /// Where those sleep that wait for an element.
    items: Lines<WaitWord>,
    /// Where those sleep that wait for room.
    room: WaitWord,
    /// A segment that nobody uses, or 0.
    spare: AtomicU64,
    /// Changes rarely.
    closed: Lines<AtomicU32>,
    laps: Laps,
}

impl Ends {
    /// Of an empty queue whose first segment is [new](Segment::new).
    pub fn new(laps: Laps, segment: u64) -> Ends {
        Ends {
            push: Lines(End::new(segment)),
            tail: Lines(AtomicU64::new(0)),
            pop: Lines(End::new(segment)),
            head: Lines(AtomicU64::new(0)),
            items: Lines(WaitWord::new()),
            room: WaitWord::new(),
            spare: AtomicU64::new(0),
            closed: Lines(AtomicU32::new(0)),
            laps,
        }
    }

    /// How positions count.
    #[inline]
    pub fn laps(&self) -> Laps {
        self.laps
    }

    /// Where those sleep that wait for an element.
    #[inline]
    pub fn items(&self) -> &WaitWord {
        &self.items.0
    }

    /// Where those sleep that wait for room.
    #[inline]
    pub fn room(&self) -> &WaitWord {
        &self.room
    }

    /// Takes the push end, until the deadline at most.
    #[inline]
    pub fn push_turn(&self, deadline: Option<Instant>) -> Option<PushTurn<'_>> {
        let guard = self.push.0.take(deadline)?;
        Some(PushTurn {
            ends: self,
            tail: self.tail.0.load(Ordering::Acquire),
            guard,
        })
    }

    /// Takes the pop end, until the deadline at most.
    #[inline]
    pub fn pop_turn(&self, deadline: Option<Instant>) -> Option<PopTurn<'_>> {
        let guard = self.pop.0.take(deadline)?;
        Some(PopTurn {
            ends: self,
            head: self.head.0.load(Ordering::Acquire),
            guard,
        })
    }

    /// Why the queue is closed; 0 if it is open. Asked before an element is looked for: if there is none then, none will come.
    #[inline]
    pub fn closed(&self) -> u32 {
        self.closed.0.load(Ordering::SeqCst)
    }

    /// Closes the queue if `is_so` still holds when nobody can push, and if nobody pushes until the deadline; says why it is closed, 0 if it is not.
    pub fn close_if(
        &self,
        why: u32,
        deadline: Option<Instant>,
        is_so: impl FnOnce() -> bool,
    ) -> u32 {
        let Some(turn) = self.push_turn(deadline) else {
            return self.closed();
        };
        if is_so() {
            self.closed.0.fetch_or(why, Ordering::SeqCst);
        }
        let closed = self.closed();
        drop(turn);
        crash_point!("shm.queue.closed_before_wake");
        if closed != 0 {
            self.wake_all();
        }
        closed
    }

    /// Wakes one that waits for an element, after a push has freed its end.
    #[inline]
    pub fn wake_popper(&self) {
        barrier_after_unlock();
        self.items().notify_one();
    }

    /// Wakes one that waits for room, after a pop has freed its end.
    #[inline]
    pub fn wake_pusher(&self) {
        if self.laps.is_ring {
            barrier_after_unlock();
            self.room.notify_one();
        }
    }

    /// Makes all who wait look again.
    pub fn wake_all(&self) {
        fence(Ordering::SeqCst);
        self.items().notify_all();
        self.room.notify_all();
    }

    /// Whether there is nothing to pop, without the lock. True only of the moment.
    #[inline]
    pub fn looks_empty(&self) -> bool {
        let head = self.head.0.load(Ordering::SeqCst);
        // Invariant 6: what was seen is not more than there is.
        self.pop.0.seen.load(Ordering::Relaxed) <= head
            && self.tail.0.load(Ordering::SeqCst) <= head
    }

    /// Whether there is no room for a push, without the lock. True only of the moment.
    #[inline]
    pub fn looks_full(&self) -> bool {
        let tail = self.tail.0.load(Ordering::SeqCst);
        self.laps.is_ring
            && tail >= self.limit(self.push.0.seen.load(Ordering::Relaxed))
            && tail >= self.limit(self.head.0.load(Ordering::SeqCst))
    }

    /// The elements in the queue. True only of the moment.
    pub fn len(&self) -> u64 {
        // In this order the difference is not negative; it may count what is popped meanwhile.
        let head = self.head.0.load(Ordering::SeqCst);
        let tail = self.tail.0.load(Ordering::SeqCst);
        self.laps.count(head, tail)
    }

    /// Where the tail has to stop while the head is there.
    #[inline]
    fn limit(&self, head: u64) -> u64 {
        head + (1 << self.laps.bits)
    }

    /// Keeps a segment for the next push that needs one; gives it back if there is one already.
    pub fn give_spare(&self, address: u64) -> Result<(), u64> {
        let given = self
            .spare
            .compare_exchange(0, address, Ordering::AcqRel, Ordering::Relaxed);
        given.map(drop).map_err(|_| address)
    }

    /// Takes the spare segment; 0 if there is none.
    pub fn take_spare(&self) -> u64 {
        if self.spare.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.spare.swap(0, Ordering::AcqRel)
    }

    /// The address of a segment of this queue, of whichever, if it has any.
    pub(crate) fn some_segment(&self) -> Option<u64> {
        let has_segments = self.closed() & NO_SEGMENTS == 0;
        has_segments.then(|| self.push.0.segment.load(Ordering::Acquire))
    }

    /// Frees the locks: the caller has the queue for itself, so who seems to hold one has leaked its guard or is dead.
    pub(crate) fn forget_holders(&mut self) {
        self.push.0.lock = LockWord::new();
        self.pop.0.lock = LockWord::new();
    }

    /// Retires all segments of a queue that is empty and used no more, unless another one has begun to do so.
    pub(crate) fn retire_all(&mut self, segments: &impl Segments) {
        // In one step, before any is freed (invariant 7): after a death in here nobody frees them again.
        if self.closed.0.fetch_or(NO_SEGMENTS, Ordering::SeqCst) & NO_SEGMENTS != 0 {
            return;
        }
        crash_point!("shm.queue.emptied");
        let mut next = self.pop.0.segment.load(Ordering::Acquire);
        while next != 0 {
            let address = next;
            next = segments.segment(address).next();
            segments.retire(address);
        }
        match self.take_spare() {
            0 => {}
            spare => segments.retire(spare),
        }
    }
}

/// A place for one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address of its segment.
    pub segment: u64,
    /// Its number in the segment.
    pub index: u64,
}

/// Holds the push end.
pub struct PushTurn<'a> {
    ends: &'a Ends,
    tail: u64,
    #[allow(dead_code, reason = "held")]
    guard: LockGuard<'a>,
}

impl PushTurn<'_> {
    /// Whether nothing may be pushed any more.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.ends.closed.0.load(Ordering::Relaxed) != 0
    }

    /// Whether there is room for an element.
    #[inline]
    pub fn has_room(&self) -> bool {
        let ends = self.ends;
        !ends.laps.is_ring
            || self.tail != ends.limit(self.head_seen())
            || self.tail != ends.limit(self.head())
    }

    /// How many of so many elements may be pushed at once, into one segment. 0 if the queue is full.
    pub fn room(&self, wanted: u64) -> u64 {
        let laps = self.ends.laps;
        let left = wanted.min(laps.left_in_lap(self.tail));
        if !laps.is_ring {
            return left;
        }
        let room = |head| laps.per_lap - laps.count(head, self.tail);
        match room(self.head_seen()) {
            enough if enough >= left => left,
            _ => left.min(room(self.head())),
        }
    }

    /// Whether that many places on there is room, too, as far as is known.
    #[inline]
    pub fn has_room_ahead(&self, count: u64) -> bool {
        !self.ends.laps.is_ring || self.tail + count < self.ends.limit(self.head_seen())
    }

    /// The other end's position, which is then the one that was seen last.
    #[inline]
    fn head(&self) -> u64 {
        let head = self.ends.head.0.load(Ordering::SeqCst);
        // Released for one that takes the lock over from this owner.
        self.ends.push.0.seen.store(head, Ordering::Release);
        head
    }

    #[inline]
    fn head_seen(&self) -> u64 {
        self.ends.push.0.seen.load(Ordering::Acquire)
    }

    /// The place at the tail; `None` if a segment is needed and there is no [spare](Ends::give_spare).
    #[inline]
    pub fn place(&self, segments: &impl Segments) -> Option<Place> {
        let laps = self.ends.laps;
        let mut segment = self.ends.push.0.segment.load(Ordering::Acquire);
        if !laps.is_ring
            && segments.segment(segment).lap.load(Ordering::Relaxed) != laps.lap(self.tail)
        {
            segment = self.next_segment(segments, segment)?;
        }
        Some(Place {
            segment,
            index: laps.index(self.tail),
        })
    }

    #[cold]
    fn next_segment(&self, segments: &impl Segments, last: u64) -> Option<u64> {
        let link = &segments.segment(last).next;
        let mut next = link.load(Ordering::Acquire);
        if next == 0 {
            next = self.ends.take_spare();
            if next == 0 {
                return None;
            }
            crash_point!("shm.queue.spare_taken");
            let segment = segments.segment(next);
            segment.next.store(0, Ordering::Relaxed);
            let lap = self.ends.laps.lap(self.tail);
            segment.lap.store(lap, Ordering::Relaxed);
            link.store(next, Ordering::Release);
            crash_point!("shm.queue.segment_linked");
        }
        // Invariant 3: before the tail goes there.
        self.ends.push.0.segment.store(next, Ordering::Release);
        crash_point!("shm.queue.segment_entered");
        Some(next)
    }

    /// So many values have been written, from the [place](Self::place) on, no more than there was [room](Self::room): they are in the queue now.
    #[inline]
    pub fn commit(&mut self, count: u64) {
        self.tail = self.ends.laps.advance(self.tail, count);
        self.ends.tail.0.store(self.tail, Ordering::Release);
    }
}

/// Holds the pop end.
pub struct PopTurn<'a> {
    ends: &'a Ends,
    head: u64,
    #[allow(dead_code, reason = "held")]
    guard: LockGuard<'a>,
}

impl<'a> PopTurn<'a> {
    /// Whether there is an element.
    #[inline]
    pub fn has_item(&self) -> bool {
        self.tail_seen() != self.head || self.tail() != self.head
    }

    /// How many of so many elements may be popped at once, out of one segment. 0 if the queue is empty.
    pub fn items(&self, wanted: u64) -> u64 {
        let laps = self.ends.laps;
        let left = wanted.min(laps.left_in_lap(self.head));
        match laps.count(self.head, self.tail_seen()) {
            enough if enough >= left => left,
            _ => left.min(laps.count(self.head, self.tail())),
        }
    }

    /// Whether that many places on there is an element, too, as far as is known.
    #[inline]
    pub fn has_item_ahead(&self, count: u64) -> bool {
        self.head + count < self.tail_seen()
    }

    #[inline]
    fn tail_seen(&self) -> u64 {
        self.ends.pop.0.seen.load(Ordering::Acquire)
    }

    /// The other end's position, which is then the one that was seen last.
    #[inline]
    fn tail(&self) -> u64 {
        let tail = self.ends.tail.0.load(Ordering::SeqCst);
        self.ends.pop.0.seen.store(tail, Ordering::Release);
        tail
    }

    /// The place at the head, where there is an element.
    #[inline]
    pub fn place(&self, segments: &impl Segments) -> Place {
        let laps = self.ends.laps;
        let mut segment = self.ends.pop.0.segment.load(Ordering::Acquire);
        if !laps.is_ring
            && segments.segment(segment).lap.load(Ordering::Relaxed) != laps.lap(self.head)
        {
            segment = self.next_segment(segments, segment);
        }
        Place {
            segment,
            index: laps.index(self.head),
        }
    }

    #[cold]
    fn next_segment(&self, segments: &impl Segments, left: u64) -> u64 {
        let next = segments.segment(left).next.load(Ordering::Acquire);
        self.ends.pop.0.segment.store(next, Ordering::Release);
        crash_point!("shm.queue.segment_left");
        // Invariant 4.
        if self.ends.give_spare(left).is_err() {
            segments.retire(left);
        }
        crash_point!("shm.queue.segment_retired");
        next
    }

    /// So many values have been moved out, from the [place](Self::place) on, no more than there were [items](Self::items).
    #[inline]
    pub fn commit(&mut self, count: u64) {
        self.head = self.ends.laps.advance(self.head, count);
        self.ends.head.0.store(self.head, Ordering::Release);
    }

    /// From the head to the tail as it is now.
    pub fn walk(&self) -> Walk<'a> {
        Walk {
            ends: self.ends,
            at: self.head,
            to: self.tail(),
            segment: self.ends.pop.0.segment.load(Ordering::Acquire),
        }
    }
}

/// The places of the elements, in order. It is good while the pop end is held.
pub struct Walk<'a> {
    ends: &'a Ends,
    at: u64,
    to: u64,
    segment: u64,
}

impl Walk<'_> {
    /// The next one.
    pub fn next(&mut self, segments: &impl Segments) -> Option<Place> {
        if self.at == self.to {
            return None;
        }
        let laps = self.ends.laps;
        if !laps.is_ring {
            let segment = segments.segment(self.segment);
            if segment.lap.load(Ordering::Relaxed) != laps.lap(self.at) {
                self.segment = segment.next();
            }
        }
        let place = Place {
            segment: self.segment,
            index: laps.index(self.at),
        };
        self.at = laps.advance(self.at, 1);
        Some(place)
    }

    /// How many are left.
    pub fn len(&self) -> u64 {
        self.ends.laps.count(self.at, self.to)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn positions_count_through_laps_of_any_length() {
        for per_lap in [1, 2, 3, 5, 8] {
            let laps = Laps::ring(per_lap);
            let mut positions = vec![0];
            for _ in 0..4 * per_lap {
                let last = positions[positions.len() - 1];
                positions.push(laps.advance(last, 1));
            }
            for (a, &from) in positions.iter().enumerate() {
                assert_eq!(laps.index(from), a as u64 % per_lap);
                for (b, &to) in positions.iter().enumerate().skip(a) {
                    assert_eq!(laps.count(from, to), (b - a) as u64);
                    assert_eq!(from < to, a < b);
                }
                for count in 1..=laps.left_in_lap(from) {
                    let to = positions.get(a + count as usize);
                    assert!(to.is_none_or(|&to| laps.advance(from, count) == to));
                }
            }
        }
    }
}

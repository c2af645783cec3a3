//! Waiting for descriptors: epoll, the doorbell descriptor (eventfd), and the wait for a single one.
//!
//! **Invariants**
//!
//! 1. All waits are level-triggered: a descriptor is reported as long as it is ready, so nothing is lost by
//!    handling only a part of the events.
//! 2. Interruptions by signals are waited out; the deadline stays the one that was given.
//!
//! **If a process dies here**: an [`Epoll`] that forks share goes on with the registrations
//! it has; those of the dead process's descriptors end when the last copy of each is closed. An [`EventFd`] keeps its count.
//!
//! **Not here**: waiting on words in shared memory ([`crate::futex`]); the descriptors themselves
//! ([`PidFd`](crate::process::PidFd), [`SignalFd`](crate::signal::SignalFd), [`crate::socket`]).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno as RawErrno;

use crate::error::During;
use crate::futex::Deadline;

/// Events that one [`Epoll::wait`] can return; what is left over comes with the next.
const EVENTS_MAX: usize = 64;

/// The longest single sleep. A longer wait sleeps again: the kernel counts milliseconds in 32 bits.
const SLEEP_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What to wait for at a descriptor. That the other side is gone, and errors, are always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Interest {
    /// That reading (or accepting, or reaping) would not block.
    Read,
    /// That writing would not block.
    Write,
    /// Either.
    ReadWrite,
    /// Only errors and the end of the other side.
    Neither,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Interest::Read => EventFlags::IN | EventFlags::RDHUP,
            Interest::Write => EventFlags::OUT,
            Interest::ReadWrite => EventFlags::IN | EventFlags::RDHUP | EventFlags::OUT,
            Interest::Neither => EventFlags::empty(),
        }
    }
}

/// What is ready at a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    /// What the descriptor was registered with.
    pub token: u64,
    /// Reading would not block; it may give the end of the stream. A pidfd: the process has ended.
    pub readable: bool,
    /// Writing would not block; it may fail.
    pub writable: bool,
    /// The other side will send no more, though what it has sent may still be unread.
    pub read_closed: bool,
    /// The other side is gone altogether.
    pub hung_up: bool,
    /// The descriptor is in an error that the next operation on it will report.
    pub failed: bool,
}

/// A set of descriptors to wait for: `epoll(7)`. Close-on-exec.
///
/// **Trap**: what is registered is the open file behind a descriptor, and it stays registered until its last copy is
/// closed, in this process or in a fork. [`remove`](Self::remove) a descriptor before closing it. Once it
/// is closed while a copy lives on in a child, it goes on firing and there is no way left to remove it.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes an empty set.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE` without free descriptors; `ENOMEM`.
    pub fn new() -> crate::Result<Epoll> {
        epoll::create(epoll::CreateFlags::CLOEXEC)
            .map(Epoll)
            .during("epoll_create1", "")
    }

    /// Registers a descriptor. Its events will carry `token`.
    ///
    /// # Errors
    ///
    /// `EEXIST` if it is registered already; `EPERM` if it is of a kind that is always ready (a regular file);
    /// `ENOSPC` at the user's limit of registrations; `ENOMEM`.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> crate::Result<()> {
        let fd = fd.as_fd();
        epoll::add(&self.0, fd, EventData::new_u64(token), interest.flags())
            .during("epoll_ctl(ADD)", descriptor(&fd))
    }

    /// Changes what a registered descriptor is waited for, and its token.
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> crate::Result<()> {
        let fd = fd.as_fd();
        epoll::modify(&self.0, fd, EventData::new_u64(token), interest.flags())
            .during("epoll_ctl(MOD)", descriptor(&fd))
    }

    /// Takes a descriptor out of the set. Events of it that a `wait` has returned already are the caller's to skip.
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered.
    pub fn remove(&self, fd: impl AsFd) -> crate::Result<()> {
        let fd = fd.as_fd();
        epoll::delete(&self.0, fd).during("epoll_ctl(DEL)", descriptor(&fd))
    }

    /// Waits until at least one descriptor is ready, and puts the ready ones into `events`, which is cleared before.
    /// It is left empty if the deadline passed. A deadline in the past: looks, without waiting.
    ///
    /// # Errors
    ///
    /// None that Linux knows.
    ///
    /// # Blocking
    ///
    /// Until the deadline; without one for ever. Interruptions by signals are waited out.
    pub fn wait(&self, events: &mut Vec<Event>, deadline: Option<Deadline>) -> crate::Result<()> {
        events.clear();
        let mut ready = [MaybeUninit::uninit(); EVENTS_MAX];
        loop {
            let sleep = Sleep::until(deadline);
            match epoll::wait(&self.0, &mut ready, Some(&sleep.timeout)) {
                Ok((ready, _)) if !ready.is_empty() => {
                    events.extend(ready.iter().map(event));
                    return Ok(());
                }
                Ok(_) if sleep.is_last => return Ok(()),
                Ok(_) | Err(RawErrno::INTR) => {}
                Err(errno) => return Err(errno).during("epoll_wait", descriptor(&self.0)),
            }
        }
    }
}

fn event(raw: &epoll::Event) -> Event {
    let flags = raw.flags;
    Event {
        token: raw.data.u64(),
        readable: flags.contains(EventFlags::IN),
        writable: flags.contains(EventFlags::OUT),
        read_closed: flags.intersects(EventFlags::RDHUP | EventFlags::HUP),
        hung_up: flags.contains(EventFlags::HUP),
        failed: flags.contains(EventFlags::ERR),
    }
}

fn descriptor(fd: &impl AsRawFd) -> String {
    format!("descriptor {}", fd.as_raw_fd())
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes a descriptor that `epoll_create1` made, moved to another number perhaps.
impl From<OwnedFd> for Epoll {
    fn from(fd: OwnedFd) -> Self {
        Epoll(fd)
    }
}

impl From<Epoll> for OwnedFd {
    fn from(epoll: Epoll) -> Self {
        epoll.0
    }
}

/// One sleep of a wait that may take several.
struct Sleep {
    timeout: Timespec,
    /// Whether the deadline is reached at its end.
    is_last: bool,
}

impl Sleep {
    fn until(deadline: Option<Deadline>) -> Sleep {
        let remaining = deadline.map_or(Duration::MAX, |deadline| deadline.remaining());
        let sleep = remaining.min(SLEEP_MAX);
        Sleep {
            timeout: Timespec {
                tv_sec: sleep.as_secs() as i64,
                tv_nsec: sleep.subsec_nanos().into(),
            },
            is_last: sleep == remaining,
        }
    }
}

/// Waits until one descriptor is readable, or its other side is gone: `poll(2)`. False if the deadline passed
/// before.
///
/// # Errors
///
/// `EINVAL` if the limit of descriptors is 0; `ENOMEM`.
///
/// # Blocking
///
/// Until the deadline; without one for ever. Interruptions by signals are waited out.
pub fn wait_readable(fd: impl AsFd, deadline: Option<Deadline>) -> crate::Result<bool> {
    wait_single(fd.as_fd(), PollFlags::IN, deadline)
}

/// Waits until one descriptor is writable, or its other side is gone: `poll(2)`. False if the deadline passed
/// before.
///
/// # Errors
///
/// As [`wait_readable`].
///
/// # Blocking
///
/// As [`wait_readable`].
pub fn wait_writable(fd: impl AsFd, deadline: Option<Deadline>) -> crate::Result<bool> {
    wait_single(fd.as_fd(), PollFlags::OUT, deadline)
}

fn wait_single(
    fd: BorrowedFd<'_>,
    flags: PollFlags,
    deadline: Option<Deadline>,
) -> crate::Result<bool> {
    loop {
        let sleep = Sleep::until(deadline);
        let mut set = [PollFd::from_borrowed_fd(fd, flags)];
        match rustix::event::poll(&mut set, Some(&sleep.timeout)) {
            Ok(0) if sleep.is_last => return Ok(false),
            Ok(0) | Err(RawErrno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno).during("poll", descriptor(&fd)),
        }
    }
}

/// A doorbell that processes share: `eventfd(2)`. Non-blocking, close-on-exec.
///
/// It is readable from the first [`ring`](Self::ring) until the next [`drain`](Self::drain), which takes all rings
/// at once. A ring is one store in the kernel: a process killed in it has rung or has not.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Makes a doorbell that has not been rung.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE` without free descriptors; `ENOMEM`.
    pub fn new() -> crate::Result<EventFd> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(EventFd)
            .during("eventfd", "")
    }

    /// Rings. A bell that cannot count further is ringing already: success.
    ///
    /// # Errors
    ///
    /// None that Linux knows for an eventfd.
    pub fn ring(&self) -> crate::Result<()> {
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &1u64.to_ne_bytes())) {
            Ok(_) | Err(RawErrno::AGAIN) => Ok(()),
            Err(errno) => Err(errno).during("write", descriptor(&self.0)),
        }
    }

    /// Returns how often it was rung since the last time, and silences it. 0: not at all.
    ///
    /// # Errors
    ///
    /// None that Linux knows for an eventfd.
    pub fn drain(&self) -> crate::Result<u64> {
        let mut count = [0; 8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut count[..])) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(RawErrno::AGAIN) => Ok(0),
            Err(errno) => Err(errno).during("read", descriptor(&self.0)),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes a descriptor that `eventfd` made, inherited or moved to another number perhaps. It should be non-blocking:
/// else [`EventFd::drain`] blocks until there is a ring.
impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        EventFd(fd)
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event_fd: EventFd) -> Self {
        event_fd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Errno;
    use std::time::Instant;

    fn now() -> Option<Deadline> {
        Some(Deadline::after(Duration::ZERO))
    }

    #[test]
    fn eventfd_counts_rings_and_is_silenced() {
        let bell = EventFd::new().unwrap();
        assert_eq!(bell.drain().unwrap(), 0);
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(wait_readable(&bell, now()).unwrap());
        assert_eq!(bell.drain().unwrap(), 2);
        assert!(!wait_readable(&bell, now()).unwrap());
    }

    #[test]
    fn eventfd_rung_to_the_limit_still_rings() {
        let bell = EventFd::new().unwrap();
        rustix::io::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring().unwrap();
        assert_eq!(bell.drain().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn epoll_reports_tokens_until_removed() {
        let epoll = Epoll::new().unwrap();
        let (first, second) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        epoll.add(&first, u64::MAX, Interest::Read).unwrap();
        epoll.add(&second, 7, Interest::Read).unwrap();
        let mut events = Vec::new();
        epoll.wait(&mut events, now()).unwrap();
        assert_eq!(events, []);

        first.ring().unwrap();
        for _level_triggered in 0..2 {
            epoll.wait(&mut events, None).unwrap();
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].token, u64::MAX);
            assert!(events[0].readable && !events[0].writable && !events[0].hung_up);
        }
        epoll.modify(&first, 8, Interest::ReadWrite).unwrap();
        epoll.wait(&mut events, None).unwrap();
        assert_eq!(events[0].token, 8);
        assert!(events[0].readable && events[0].writable);

        epoll.remove(&first).unwrap();
        epoll.wait(&mut events, now()).unwrap();
        assert_eq!(events, []);
        assert_eq!(epoll.remove(&first).unwrap_err().errno, Errno::ENOENT);
        assert_eq!(
            epoll.add(&second, 7, Interest::Read).unwrap_err().errno,
            Errno::EEXIST
        );
    }

    #[test]
    fn epoll_wait_ends_at_the_deadline_and_not_before() {
        let epoll = Epoll::new().unwrap();
        let start = Instant::now();
        let mut events = Vec::new();
        epoll
            .wait(
                &mut events,
                Some(Deadline::after(Duration::from_micros(20_300))),
            )
            .unwrap();
        assert_eq!(events, []);
        assert!(start.elapsed() >= Duration::from_micros(20_300));
    }

    #[test]
    fn epoll_reports_more_than_one_call_holds() {
        let epoll = Epoll::new().unwrap();
        let bells: Vec<_> = (0..EVENTS_MAX + 6)
            .map(|_| EventFd::new().unwrap())
            .collect();
        for (token, bell) in bells.iter().enumerate() {
            epoll.add(bell, token as u64, Interest::Read).unwrap();
            bell.ring().unwrap();
        }
        let mut seen = Vec::new();
        let mut events = Vec::new();
        while seen.len() < bells.len() {
            epoll.wait(&mut events, now()).unwrap();
            assert!(
                !events.is_empty(),
                "after {} of {}",
                seen.len(),
                bells.len()
            );
            for event in &events {
                bells[event.token as usize].drain().unwrap();
                seen.push(event.token);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..bells.len() as u64).collect::<Vec<_>>());
    }
}

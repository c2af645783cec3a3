//! When to spin before sleeping: briefly, with loads only, and only as long as it has paid of late.
//!
//! Waking a sleeping core costs some 25 µs, so a lock that is free again in 1 µs is worth waiting for awake. A
//! lock held for long is not: its holder, or whoever it waits for, may need the processor on which we spin.
//!
//! **Invariants.** All state is of this process, and a hint: any value of it is right.

use crossbeam::utils::Backoff;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

/// Rounds of one spin; they double up to 64 pauses each, together about 150 pauses or 2–5 µs.
const ROUNDS: u32 = 7;
/// How many spins in vain, without one that paid, make us stop.
const TRUST_MAX: i32 = 8;
/// For how many waits we then sleep at once before spinning is tried again.
const WAITS_WITHOUT_SPIN: i32 = 32;

/// How spins of one kind have paid of late. Above 0: spins in vain that we still allow. Below: waits until
/// spinning is tried again.
pub(crate) struct Trust(AtomicI32);

/// Waits for locks: short, as a rule.
pub(crate) static LOCKS: Trust = Trust::new();
/// Waits for what others do: for work, for an event. They may be long, and shall not spoil the trust in locks.
pub(crate) static EVENTS: Trust = Trust::new();

impl Trust {
    const fn new() -> Trust {
        Trust(AtomicI32::new(TRUST_MAX))
    }

    /// Calls `attempt` with growing pauses between the calls until it gives something; gives up soon.
    pub(crate) fn spin<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
        let trust = self.0.load(Ordering::Relaxed);
        if trust <= 0 {
            let next = if trust < -1 { trust + 1 } else { 1 };
            self.0.store(next, Ordering::Relaxed);
            return None;
        }
        let backoff = Backoff::new();
        for _ in 0..ROUNDS {
            backoff.spin();
            if let Some(gained) = attempt() {
                self.0.store(TRUST_MAX, Ordering::Relaxed);
                return Some(gained);
            }
        }
        let next = if trust > 1 {
            trust - 1
        } else {
            -WAITS_WITHOUT_SPIN
        };
        self.0.store(next, Ordering::Relaxed);
        None
    }
}

/// Whether this process may use more than one processor, as it was when first asked.
pub(crate) fn several_processors() -> bool {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    match COUNT.load(Ordering::Relaxed) {
        0 => {
            let count = netmcore_sys::process::available_processors();
            COUNT.store(count.max(1), Ordering::Relaxed);
            count > 1
        }
        count => count > 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_stops_when_it_does_not_pay_and_is_tried_again() {
        let trust = Trust::new();
        let mut calls = 0;
        for _ in 0..TRUST_MAX {
            assert_eq!(
                trust.spin(|| {
                    calls += 1;
                    None::<()>
                }),
                None
            );
        }
        assert_eq!(calls, TRUST_MAX * ROUNDS.cast_signed());
        for _ in 0..WAITS_WITHOUT_SPIN {
            assert_eq!(trust.spin(|| Some(())), None, "sleeps at once");
        }
        assert_eq!(trust.spin(|| Some(7)), Some(7), "tried again");
        assert_eq!(trust.0.load(Ordering::Relaxed), TRUST_MAX);
    }
}

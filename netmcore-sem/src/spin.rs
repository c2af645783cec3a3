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

/// Above 0: spins in vain that we still allow. Below: waits until spinning is tried again.
static TRUST: AtomicI32 = AtomicI32::new(TRUST_MAX);

/// Calls `attempt` with growing pauses between the calls until it gives something; gives up soon.
pub(crate) fn spin<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let trust = TRUST.load(Ordering::Relaxed);
    if trust <= 0 {
        let next = if trust < -1 { trust + 1 } else { 1 };
        TRUST.store(next, Ordering::Relaxed);
        return None;
    }
    let backoff = Backoff::new();
    for _ in 0..ROUNDS {
        backoff.spin();
        if let Some(gained) = attempt() {
            TRUST.store(TRUST_MAX, Ordering::Relaxed);
            return Some(gained);
        }
    }
    let next = if trust > 1 {
        trust - 1
    } else {
        -WAITS_WITHOUT_SPIN
    };
    TRUST.store(next, Ordering::Relaxed);
    None
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

    // One test: the trust is of the whole process.
    #[test]
    fn spinning_stops_when_it_does_not_pay_and_is_tried_again() {
        let mut calls = 0;
        for _ in 0..TRUST_MAX {
            assert_eq!(
                spin(|| {
                    calls += 1;
                    None::<()>
                }),
                None
            );
        }
        assert_eq!(calls, TRUST_MAX * ROUNDS.cast_signed());
        for _ in 0..WAITS_WITHOUT_SPIN {
            assert_eq!(spin(|| Some(())), None, "sleeps at once");
        }
        assert_eq!(spin(|| Some(7)), Some(7), "tried again");
        assert_eq!(TRUST.load(Ordering::Relaxed), TRUST_MAX);
    }
}

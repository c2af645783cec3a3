//! Values that count by themselves: std's atomic integers, for [`ShmHashMap::add`](super::ShmHashMap::add).

use std::sync::atomic;

/// An atomic integer that a shared map can add to without replacing the entry.
pub trait ShmCounter {
    /// The plain integer.
    type Number: Copy + Default;

    /// A counter at this number.
    fn starting_at(number: Self::Number) -> Self;

    /// Adds, wrapping around; gives the number before.
    fn add(&self, number: Self::Number) -> Self::Number;
}

macro_rules! counters {
    ($($counter:ident: $number:ty),* $(,)?) => {
        $(
            impl ShmCounter for atomic::$counter {
                type Number = $number;

                fn starting_at(number: $number) -> Self {
                    Self::new(number)
                }

                fn add(&self, number: $number) -> $number {
                    self.fetch_add(number, atomic::Ordering::AcqRel)
                }
            }
        )*
    };
}

counters! {
    AtomicU8: u8, AtomicU16: u16, AtomicU32: u32, AtomicU64: u64, AtomicUsize: usize,
    AtomicI8: i8, AtomicI16: i16, AtomicI32: i32, AtomicI64: i64, AtomicIsize: isize,
}

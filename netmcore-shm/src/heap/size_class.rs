//! Sizes of small blocks: every 16 bytes up to 128, then four for each doubling.
//!
//! **Invariants.**
//! 1. A block's class follows from its layout alone, so who frees it finds the same one.
//! 2. Blocks of a class lie at multiples of its natural alignment, the largest power of two that divides its size.

use super::page::PAGE_BYTES;
use std::alloc::Layout;

/// Block sizes in bytes, ascending.
const SIZES: [u32; COUNT] = [
    16, 32, 48, 64, 80, 96, 112, 128, // eighths
    160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, // quarters
    1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, //
    10240, 12288, 14336, 16384, //
    21760, 32704, // three and two to a page
];

/// How many classes there are.
pub(super) const COUNT: usize = 38;

/// The longest small block in bytes. A longer one is a run of pages.
const MAX_LEN_BYTES: usize = SIZES[COUNT - 1] as usize;

const fn table<const N: usize>(unit_bytes: usize) -> [u8; N] {
    let mut table = [0; N];
    let (mut units, mut class) = (0, 0);
    while units < N {
        while class < COUNT && units * unit_bytes > SIZES[class] as usize {
            class += 1;
        }
        table[units] = class as u8;
        units += 1;
    }
    table
}

/// Up to 1 KiB: for each length in units of 16 bytes, rounded up, its class.
static CLASS_OF_16: [u8; 1024 / 16 + 1] = table(16);
/// From there on: for each length in units of 64 bytes.
static CLASS_OF_64: [u8; MAX_LEN_BYTES / 64 + 1] = table(64);

/// The class of blocks of that layout; `None` if it is not for small blocks.
pub(super) fn class_of(layout: Layout) -> Option<usize> {
    class_of_usual(layout).or_else(|| class_of_aligned(layout))
}

/// The same, of layouts that are aligned to 16 bytes at most. Without a call.
#[inline]
pub(super) fn class_of_usual(layout: Layout) -> Option<usize> {
    if layout.align() <= 16 {
        class_of_len(layout.size())
    } else {
        None
    }
}

#[inline]
fn class_of_len(len_bytes: usize) -> Option<usize> {
    if len_bytes <= 1024 {
        Some(usize::from(CLASS_OF_16[len_bytes.div_ceil(16)]))
    } else {
        let class = CLASS_OF_64.get(len_bytes.div_ceil(64))?;
        Some(usize::from(*class))
    }
}

fn class_of_aligned(layout: Layout) -> Option<usize> {
    let align = layout.align();
    // An empty block has an address too.
    let len_bytes = layout.size().max(1).checked_next_multiple_of(align)?;
    let first = class_of_len(len_bytes)?;
    (first..COUNT).find(|&class| size(class).is_multiple_of(align))
}

/// The size in bytes of the blocks of a class.
#[inline]
pub(super) const fn size(class: usize) -> usize {
    SIZES[class] as usize
}

/// The alignment that all blocks of the class have.
pub(super) const fn natural_align(class: usize) -> usize {
    1 << SIZES[class].trailing_zeros()
}

/// For each class 2³² by its size, rounded up.
const RECIPROCALS: [u32; COUNT] = {
    let mut reciprocals = [0; COUNT];
    let mut class = 0;
    while class < COUNT {
        reciprocals[class] = ((1 << 32) / SIZES[class] as u64 + 1) as u32;
        class += 1;
    }
    reciprocals
};

/// The number of the block that begins `offset` bytes, less than a page, behind the first of its page.
#[inline]
pub(super) fn index_at(class: usize, offset: usize) -> usize {
    debug_assert!(offset < PAGE_BYTES && offset.is_multiple_of(size(class)));
    // Exact: the reciprocal is at most 1 too large, which makes less than 2⁻¹⁶ here, and the quotient is whole.
    ((offset as u64 * u64::from(RECIPROCALS[class])) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_is_the_smallest_that_fits() {
        for len in 0..=40_000 {
            for align in (0..=17).map(|power| 1_usize << power) {
                let layout = Layout::from_size_align(len, align).unwrap();
                let fits = |class: usize| size(class) >= len && size(class).is_multiple_of(align);
                let smallest = (0..COUNT).find(|&class| fits(class));
                // Classes that the alignment would waste most of are left out.
                match class_of(layout) {
                    Some(class) => assert_eq!(Some(class), smallest, "{layout:?}"),
                    None => assert!(smallest.is_none(), "{layout:?}"),
                }
            }
        }
    }

    #[test]
    fn sizes_ascend_by_a_quarter_at_most() {
        for class in 8..COUNT - 2 {
            assert!(size(class) > size(class - 1));
            assert!(size(class) * 4 <= size(class - 1) * 5);
        }
    }

    #[test]
    fn index_is_the_quotient() {
        for class in 0..COUNT {
            for index in 0..PAGE_BYTES.div_ceil(size(class)) {
                assert_eq!(index_at(class, index * size(class)), index);
            }
        }
    }
}

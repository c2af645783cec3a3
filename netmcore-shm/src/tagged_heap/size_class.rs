//! Sizes of small blocks: about four for each doubling, cut so that they fill a page.

use super::layout::PAGE_BYTES;

/// Block sizes in bytes, ascending, all multiples of 64.
pub(super) const SIZES: [u32; 29] = [
    64, 128, 192, 256, 320, 384, 448, 512, // eighths up to 512
    640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, // quarters
    5440, 6528, 8192, // 12, 10 and 8 to a page
    9344, 10880, 13056, 16384, 21824, 32768, // 7, 6, 5, 4, 3 and 2
];

/// How many blocks of each class a page holds.
const BLOCKS: [u16; COUNT] = {
    let mut blocks = [0; COUNT];
    let mut class = 0;
    while class < COUNT {
        blocks[class] = (PAGE_BYTES / SIZES[class] as usize) as u16;
        class += 1;
    }
    blocks
};

/// How many classes there are.
pub(super) const COUNT: usize = SIZES.len();

/// The longest small block in bytes: half a page. A longer one is a run of pages.
pub(super) const MAX_LEN_BYTES: usize = 32768;

/// For each length in units of 64 bytes, rounded up: its class.
const CLASS_OF: [u8; MAX_LEN_BYTES / 64 + 1] = {
    let mut table = [0; MAX_LEN_BYTES / 64 + 1];
    let (mut units, mut class) = (0, 0);
    while units < table.len() {
        if units * 64 > SIZES[class] as usize {
            class += 1;
        }
        table[units] = class as u8;
        units += 1;
    }
    table
};

/// The class for blocks of `len_bytes`; `None` if that is not small.
pub(super) fn class_of(len_bytes: usize) -> Option<usize> {
    CLASS_OF
        .get(len_bytes.div_ceil(64))
        .map(|&class| usize::from(class))
}

/// The size in bytes of the blocks of a class.
pub(super) fn size(class: usize) -> usize {
    SIZES[class] as usize
}

/// Which block of a page of the class the offset in the page lies in.
pub(super) fn index_at(class: usize, offset: usize) -> usize {
    // Less than 2^16: a division of 32 bits, which is much faster.
    (offset as u32 / SIZES[class]) as usize
}

/// How many blocks of a class a page holds.
pub(super) fn blocks_in_page(class: usize) -> usize {
    usize::from(BLOCKS[class])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_class_that_fits_is_chosen() {
        for len in 0..=MAX_LEN_BYTES {
            let class = class_of(len).unwrap();
            assert!(len <= size(class), "{len}");
            assert!(class == 0 || len > size(class - 1), "{len}");
        }
        assert_eq!(class_of(MAX_LEN_BYTES + 1), None);
        assert_eq!(class_of(usize::MAX), None);
    }

    #[test]
    fn classes_ascend_and_waste_little() {
        for class in 0..COUNT {
            assert!(size(class).is_multiple_of(64));
            assert!(class == 0 || size(class) > size(class - 1));
            let wasted = PAGE_BYTES - blocks_in_page(class) * size(class);
            assert!(wasted * 20 < PAGE_BYTES, "{class}: {wasted}");
        }
    }
}

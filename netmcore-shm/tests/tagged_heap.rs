//! Guards against a heap that gives out memory twice, loses it, keeps it from the system, or believes a bad block.
//!
//! # Safety
//!
//! Each heap lies in a new region that is kept beside it, and each block has one user at a time.

#![allow(unsafe_code)]

use netmcore_sem::SoloOwners;
use netmcore_shm::{AnonRegion, Arena, Block, Error, TaggedHeap, headroom};
use std::num::NonZeroU64;

struct Heap {
    heap: TaggedHeap,
    region: AnonRegion,
}

impl std::ops::Deref for Heap {
    type Target = TaggedHeap;
    fn deref(&self) -> &TaggedHeap {
        &self.heap
    }
}

fn heap(len_bytes: usize) -> Heap {
    let arena = Arena::reserve(Arena::MIN_LEN_BYTES.max(2 * len_bytes)).unwrap();
    let region = AnonRegion::create(c"tagged-heap-test", &arena, len_bytes).unwrap();
    // SAFETY: the region is new and kept beside the view.
    let heap = unsafe { TaggedHeap::create(region.at(), region.len_bytes()) }.unwrap();
    Heap { heap, region }
}

fn tag(number: u64) -> NonZeroU64 {
    NonZeroU64::new(number).unwrap()
}

fn alloc(heap: &TaggedHeap, len: usize, of: u64) -> Block {
    let block = heap.alloc(len, tag(of), &SoloOwners).unwrap();
    assert_eq!(block.len, len as u64);
    block
}

fn fill(heap: &TaggedHeap, block: Block, byte: u8) {
    // SAFETY: the tests that use this are the only users of their blocks.
    unsafe { heap.bytes_mut(block) }.unwrap().fill(byte);
}

fn holds(heap: &TaggedHeap, block: Block, byte: u8) -> bool {
    // SAFETY: as for `fill`.
    let bytes = unsafe { heap.bytes(block) }.unwrap();
    bytes.iter().all(|&found| found == byte)
}

/// Bytes of the region that this process has mapped present: Rss in `/proc/self/smaps`.
fn resident_bytes(heap: &Heap) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", heap.region.at().addr());
    let ours = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .skip(1);
    let rss = ours
        .take_while(|line| !line.starts_with("VmFlags"))
        .find_map(|line| line.strip_prefix("Rss:"));
    let kib = rss.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn blocks_of_all_sizes_do_not_overlap() {
    let heap = heap(64 << 20);
    let lens = (0..=512).chain((512..70_000).step_by(611)).chain([
        32_768,
        32_769,
        65_536,
        65_537,
        1 << 20,
    ]);
    let blocks: Vec<Block> = lens.map(|len| alloc(&heap, len, 1)).collect();
    for (index, &block) in blocks.iter().enumerate() {
        assert!(block.offset.is_multiple_of(64));
        fill(&heap, block, index as u8);
    }
    for (index, &block) in blocks.iter().enumerate() {
        assert!(holds(&heap, block, index as u8), "{block:?}");
    }
    heap.verify().unwrap();
    assert_eq!(heap.stats().in_use_blocks, blocks.len() as u64);
    for &block in &blocks {
        assert!(heap.free(block, tag(1)));
    }
    heap.verify().unwrap();
    let stats = heap.stats();
    assert_eq!((stats.in_use_blocks, stats.in_use_bytes), (0, 0));
}

#[test]
fn freed_block_is_nobodys_and_comes_back() {
    let heap = heap(8 << 20);
    for len in [1, 64, 5_000, 40_000, 300_000] {
        let block = alloc(&heap, len, 1);
        assert!(!heap.free(block, tag(2)));
        assert!(heap.free(block, tag(1)));
        assert!(!heap.free(block, tag(1)));
        // SAFETY: an error is expected.
        let bytes = unsafe { heap.bytes(block) };
        assert!(matches!(bytes, Err(Error::BadBlock { .. })), "{bytes:?}");
        assert_eq!(alloc(&heap, len, 1).offset, block.offset, "{len}");
    }
    heap.verify().unwrap();
}

#[test]
fn all_of_a_tag_are_freed_and_no_others() {
    let heap = heap(64 << 20);
    let mut others = Vec::new();
    for round in 0..3_000 {
        alloc(&heap, round % 2_000, 7);
        if round % 3 == 0 {
            others.push(alloc(&heap, round % 1_500, 8));
        }
        if round % 500 == 0 {
            alloc(&heap, 100_000 + round, 7);
            others.push(alloc(&heap, 70_000 + round, 8));
        }
    }
    for &block in &others {
        fill(&heap, block, 8);
    }
    assert_eq!(heap.free_all(tag(7)), 3_006);
    assert_eq!(heap.free_all(tag(7)), 0);
    heap.verify().unwrap();
    assert!(others.iter().all(|&block| holds(&heap, block, 8)));
    assert_eq!(heap.stats().in_use_blocks, others.len() as u64);
    assert_eq!(heap.free_all(tag(8)), others.len());
    assert_eq!(heap.stats().in_use_bytes, 0);
}

#[test]
fn full_heap_says_so_and_recovers_all_its_memory() {
    let heap = heap(4 << 20);
    let max = heap.stats().max_bytes;
    // The largest block is everything.
    let all = alloc(&heap, max as usize, 1);
    let refused = heap.alloc(1, tag(1), &SoloOwners).unwrap_err();
    assert!(matches!(
        refused,
        Error::OutOfPoolMemory { free_bytes: 0, .. }
    ));
    assert!(heap.free(all, tag(1)));
    let refused = heap
        .alloc(max as usize + 1, tag(1), &SoloOwners)
        .unwrap_err();
    match refused {
        Error::OutOfPoolMemory {
            wanted_bytes,
            free_bytes,
            largest_free_bytes,
        } => {
            assert_eq!(wanted_bytes, max + 1);
            assert_eq!((free_bytes, largest_free_bytes), (max, max));
        }
        other => panic!("{other:?}"),
    }
    assert!(heap.alloc(usize::MAX, tag(1), &SoloOwners).is_err());
    // Fill it with small blocks, free them, and it is whole again: empty chunks go back.
    let mut count = 0;
    while heap.alloc(64, tag(2), &SoloOwners).is_ok() {
        count += 1;
    }
    assert_eq!(count, max / 64);
    heap.verify().unwrap();
    assert_eq!(heap.free_all(tag(2)), count as usize);
    let all = alloc(&heap, max as usize, 3);
    assert!(heap.free(all, tag(3)));
    heap.verify().unwrap();
}

#[test]
fn bad_blocks_are_refused() {
    let heap = heap(8 << 20);
    let small = alloc(&heap, 100, 1);
    let large = alloc(&heap, 200_000, 1);
    let claims = [
        (0, 1),
        (64, 1),
        (u64::MAX, 1),
        (small.offset + 1, 1),
        (small.offset + 64, 1),
        (small.offset + 128, 1),
        (small.offset, 129),
        (small.offset, u64::MAX),
        (large.offset + 64, 1),
        (large.offset + (64 << 10), 1),
        (large.offset, (256 << 10) + 1),
        (8 << 20, 0),
        ((8 << 20) - (64 << 10), 1),
    ];
    for (offset, len) in claims {
        let block = Block { offset, len };
        // SAFETY: an error is expected.
        let bytes = unsafe { heap.bytes(block) };
        assert!(matches!(bytes, Err(Error::BadBlock { .. })), "{block:?}");
        let may_be_freed = offset == small.offset || offset == large.offset;
        assert!(may_be_freed || !heap.free(block, tag(1)), "{block:?}");
    }
    fill(&heap, large, 1);
    assert!(!heap.free(small, tag(TaggedHeap::TAG_LIMIT)));
    assert_eq!(heap.free_all(tag(u64::MAX)), 0);
    assert!(heap.free(small, tag(1)) && heap.free(large, tag(1)));
}

#[test]
#[should_panic(expected = "not below 2^62")]
fn tag_out_of_range_panics() {
    let heap = heap(8 << 20);
    let _ = heap.alloc(1, tag(TaggedHeap::TAG_LIMIT), &SoloOwners);
}

#[test]
fn freed_memory_goes_back_to_the_system() {
    let heap = heap(256 << 20);
    let len = 100 << 20;
    for by_free_all in [false, true] {
        let block = alloc(&heap, len, 1);
        fill(&heap, block, 0xa5);
        assert!(resident_bytes(&heap) >= len as u64);
        assert!(heap.stats().committed_bytes >= len as u64);
        if by_free_all {
            assert_eq!(heap.free_all(tag(1)), 1);
        } else {
            assert!(heap.free(block, tag(1)));
        }
        assert!(resident_bytes(&heap) < 1 << 20);
        assert!(heap.stats().committed_bytes < 1 << 20);
        // Gone for everybody, not only unmapped here.
        let again = alloc(&heap, len, 1);
        assert_eq!(again.offset, block.offset);
        assert!(holds(&heap, again, 0));
        assert!(heap.free(again, tag(1)));
    }
    // Little memory is kept, but only little.
    let blocks: Vec<Block> = (0..1_000).map(|_| alloc(&heap, 65_536, 1)).collect();
    assert!(resident_bytes(&heap) >= 60 << 20);
    for block in blocks {
        assert!(heap.free(block, tag(1)));
    }
    let kept = resident_bytes(&heap);
    assert!((15 << 20..18 << 20).contains(&kept), "{kept}");
    heap.verify().unwrap();
}

#[test]
fn memory_of_small_blocks_serves_large_ones() {
    let heap = heap(32 << 20);
    for of in 1..20 {
        // Nearly everything as small blocks of one size each time: with chunks that stay, this would not fit.
        let len = 64 << (of % 8);
        for _ in 0..(24 << 20) / len {
            alloc(&heap, len, of);
        }
        heap.free_all(tag(of));
        let large = alloc(&heap, 27 << 20, of);
        assert!(heap.free(large, tag(of)));
        heap.verify().unwrap();
    }
}

#[test]
fn block_of_a_gigabyte() {
    let len = (1 << 30) + 12_345;
    if headroom().bytes < 3 << 30 {
        eprintln!("skipped: less than 3 GiB of memory available");
        return;
    }
    let heap = heap(4 << 30);
    let block = alloc(&heap, len, 1);
    // SAFETY: the block is ours.
    let bytes = unsafe { heap.bytes_mut(block) }.unwrap();
    assert_eq!(bytes.len(), len);
    (bytes[0], bytes[len / 2], bytes[len - 1]) = (1, 2, 3);
    let other = alloc(&heap, 100, 2);
    fill(&heap, other, 9);
    assert_eq!((bytes[0], bytes[len / 2], bytes[len - 1]), (1, 2, 3));
    assert!(heap.free(block, tag(1)));
    assert!(resident_bytes(&heap) < 1 << 20);
    assert!(holds(&heap, other, 9));
    heap.verify().unwrap();
}

#[test]
fn request_beyond_the_machines_memory_is_an_error() {
    let room = headroom().bytes;
    let heap = heap(4 * room as usize);
    match heap.alloc(2 * room as usize, tag(1), &SoloOwners) {
        Err(Error::NoSpace {
            wanted_bytes,
            free_bytes,
            ..
        }) => assert!(free_bytes < wanted_bytes),
        other => panic!("{other:?}"),
    }
    assert_eq!(heap.stats().in_use_blocks, 0);
    heap.verify().unwrap();
}

#[test]
fn attach_finds_the_heap_or_says_what_is_there() {
    let heap = heap(8 << 20);
    let block = alloc(&heap, 10, 1);
    fill(&heap, block, 4);
    // SAFETY: the heap is there, for as long.
    let again = unsafe { TaggedHeap::attach(heap.region.at()) }.unwrap();
    assert!(holds(&again, block, 4));
    assert!(again.free(block, tag(1)));
    assert_eq!(heap.stats().in_use_blocks, 0);

    let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
    let empty = AnonRegion::create(c"empty", &arena, 4096).unwrap();
    // SAFETY: a page of memory.
    let nothing = unsafe { TaggedHeap::attach(empty.at()) };
    assert!(matches!(
        nothing,
        Err(Error::FormatMismatch { found: 0, .. })
    ));
    // SAFETY: as required.
    let too_small = unsafe { TaggedHeap::create(empty.at(), empty.len_bytes()) };
    assert!(matches!(too_small, Err(Error::OutOfPoolMemory { .. })));
}

#[test]
fn verify_sees_damage() {
    let heap = heap(8 << 20);
    let block = alloc(&heap, 200_000, 1);
    heap.verify().unwrap();
    // A stray write into the map, which begins after the first 64 KiB: the run's first page gets an impossible word.
    let map = heap.region.at().wrapping_add(64 << 10).cast::<u64>();
    // SAFETY: inside the region; no other thread uses it.
    unsafe { map.write(1 << 63 | 77) };
    let corrupt = heap.verify().unwrap_err();
    assert_eq!(corrupt.offset, block.offset);
    // SAFETY: as above.
    unsafe { map.write(0) };
    heap.verify().unwrap();
}

#[test]
fn threads_share_a_heap() {
    let heap = heap(128 << 20);
    std::thread::scope(|scope| {
        for of in 1..=4 {
            let heap = &heap;
            scope.spawn(move || {
                let mut kept = Vec::new();
                for round in 0..3_000_usize {
                    let len = round * 7919 % 3_000 + usize::from(round % 100 == 0) * 90_000;
                    let block = alloc(heap, len, of);
                    fill(heap, block, of as u8);
                    kept.push(block);
                    if round % 3 != 0 {
                        let block = kept.swap_remove(round * 31 % kept.len());
                        assert!(holds(heap, block, of as u8));
                        assert!(heap.free(block, tag(of)));
                    }
                }
                assert!(kept.iter().all(|&block| holds(heap, block, of as u8)));
            });
        }
    });
    heap.verify().unwrap();
    let freed: usize = (1..=4).map(|of| heap.free_all(tag(of))).sum();
    assert_eq!(freed, 4_000);
    assert_eq!(heap.stats().in_use_blocks, 0);
    heap.verify().unwrap();
}

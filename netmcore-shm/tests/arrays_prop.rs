//! Guards against sequences that nobody thought of: vector, text, array, matrix and buffer against those of std, with death as one of the operations.
//!
//! `NETMCORE_SEED` and `NETMCORE_CASES` replay and lengthen it.

mod support;

use netmcore_shm::{
    Arena, Heap, ShmArc, ShmArray, ShmBuffer, ShmMatrix, ShmSafe, ShmString, ShmVec,
};
use netmcore_sys::{crash, process};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::collections::VecDeque;
use support::{fork, number};

/// Each is committed by one store.
#[derive(Clone, Debug)]
enum Op {
    Push(u32),
    Pop,
    Insert(usize, u32),
    Remove(usize),
    Retain(u32),
    Truncate(usize),
    Extend(Vec<u32>),
    Reserve(usize),
    ShrinkToFit,
    PushText(String),
    InsertText(usize, String),
    PopText,
    ClearText,
    ArrayPush(u32),
    ArrayGrow(usize),
    ArraySet(usize, u32),
    MatrixGrow(usize, usize),
    MatrixSet(usize, usize, u32),
    Append(Vec<u8>),
    Delete(usize),
    /// Another process does these and is killed at its `at`th crash point, if it gets so far.
    Die {
        ops: Vec<Op>,
        at: u64,
    },
}

/// What is changed through `&mut`.
#[derive(ShmSafe)]
struct Owned {
    vec: ShmVec<u32>,
    text: ShmString,
}

struct World {
    owned: ShmArc<ShmArray<Owned>>,
    array: ShmArc<ShmArray<u32>>,
    matrix: ShmArc<ShmMatrix<u32>>,
    buffer: ShmArc<ShmBuffer>,
    heap: Heap,
}

/// The oracle, and what is to be compared with it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    vec: Vec<u32>,
    text: String,
    array: Vec<u32>,
    columns: usize,
    matrix: Vec<Vec<u32>>,
    buffer: VecDeque<u8>,
    deleted: u64,
}

impl World {
    fn new() -> World {
        let arena = Arena::reserve(Arena::MIN_LEN_BYTES).unwrap();
        let heap = Heap::anonymous(&arena, 64 << 20).unwrap();
        let owned = ShmArray::from_iter_in(
            &heap,
            [Owned {
                vec: ShmVec::new_in(&heap),
                text: ShmString::new_in(&heap),
            }],
        );
        let matrix = ShmMatrix::make_in(&heap, (0, 0), 0).unwrap();
        let buffer = ShmBuffer::with_chunks_in(&heap, 64, ()).unwrap();
        World {
            owned: ShmArc::new_in(&heap, owned.unwrap()).unwrap(),
            array: ShmArc::new_in(&heap, ShmArray::new_in(&heap).unwrap()).unwrap(),
            matrix: ShmArc::new_in(&heap, matrix).unwrap(),
            buffer: ShmArc::new_in(&heap, buffer).unwrap(),
            heap,
        }
    }

    fn look(&self) -> Model {
        let owned = |owned: &Owned| (owned.vec.to_vec(), owned.text.to_string());
        let (vec, text) = self.owned.with(0, owned).unwrap();
        let matrix = self.matrix.read_rows(..).unwrap();
        Model {
            vec,
            text,
            array: self.array.to_vec().unwrap(),
            columns: matrix.dim().1,
            matrix: matrix.rows().map(<[u32]>::to_vec).collect(),
            buffer: self.buffer.sub(..).unwrap().into(),
            deleted: self.buffer.start(),
        }
    }

    fn apply(&self, op: &Op) {
        let vec = |change: &mut dyn FnMut(&mut ShmVec<u32>)| {
            self.owned
                .update(0, |owned| change(&mut owned.vec))
                .unwrap();
        };
        let text = |change: &mut dyn FnMut(&mut ShmString)| {
            self.owned
                .update(0, |owned| change(&mut owned.text))
                .unwrap();
        };
        match op {
            Op::Push(value) => vec(&mut |vec| vec.push(*value).unwrap()),
            Op::Pop => vec(&mut |vec| {
                let last = vec.last().copied();
                assert_eq!(vec.pop(), last);
            }),
            Op::Insert(at, value) => {
                vec(&mut |vec| vec.insert(at % (vec.len() + 1), *value).unwrap())
            }
            Op::Remove(at) => vec(&mut |vec| {
                if let Some(at) = at.checked_rem(vec.len()) {
                    let there = vec[at];
                    assert_eq!(vec.remove(at).unwrap(), there);
                }
            }),
            Op::Retain(of) => vec(&mut |vec| vec.retain(|value| value % of != 0).unwrap()),
            Op::Truncate(len) => vec(&mut |vec| vec.truncate(*len)),
            Op::Extend(values) => vec(&mut |vec| vec.extend_from_slice(values).unwrap()),
            Op::Reserve(more) => vec(&mut |vec| vec.reserve(*more).unwrap()),
            Op::ShrinkToFit => vec(&mut |vec| vec.shrink_to_fit().unwrap()),
            Op::PushText(more) => text(&mut |text| text.push_str(more).unwrap()),
            Op::InsertText(at, more) => text(&mut |text| {
                let at = place(text, *at);
                text.insert_str(at, more).unwrap();
            }),
            Op::PopText => text(&mut |text| {
                let last = text.chars().next_back();
                assert_eq!(text.pop(), last);
            }),
            Op::ClearText => text(&mut |text| text.clear()),
            Op::ArrayPush(value) => assert!(self.array.push(*value).unwrap() < self.array.len()),
            Op::ArrayGrow(len) => self.array.grow_with(*len, |index| index as u32).unwrap(),
            Op::ArraySet(at, value) => {
                if let Some(at) = at.checked_rem(self.array.len()) {
                    self.array.set(at, *value).unwrap();
                }
            }
            Op::MatrixGrow(rows, columns) => self.matrix.grow((*rows, *columns), 7).unwrap(),
            Op::MatrixSet(row, column, value) => {
                let (rows, columns) = self.matrix.dim();
                if rows * columns > 0 {
                    self.matrix
                        .set(row % rows, column % columns, *value)
                        .unwrap();
                }
            }
            Op::Append(bytes) => assert_eq!(
                self.buffer.sub(self.buffer.add(bytes).unwrap()).unwrap(),
                *bytes
            ),
            Op::Delete(some) => {
                self.buffer.delete_to(self.buffer.start() + *some as u64);
            }
            Op::Die { .. } => unreachable!("not in these"),
        }
    }
}

impl Model {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Push(value) => self.vec.push(*value),
            Op::Pop => drop(self.vec.pop()),
            Op::Insert(at, value) => self.vec.insert(at % (self.vec.len() + 1), *value),
            Op::Remove(at) => {
                if let Some(at) = at.checked_rem(self.vec.len()) {
                    self.vec.remove(at);
                }
            }
            Op::Retain(of) => self.vec.retain(|value| value % of != 0),
            Op::Truncate(len) => self.vec.truncate(*len),
            Op::Extend(values) => self.vec.extend_from_slice(values),
            Op::Reserve(_) | Op::ShrinkToFit => {}
            Op::PushText(more) => self.text.push_str(more),
            Op::InsertText(at, more) => self.text.insert_str(place(&self.text, *at), more),
            Op::PopText => drop(self.text.pop().map(String::from)),
            Op::ClearText => self.text.clear(),
            Op::ArrayPush(value) => self.array.push(*value),
            Op::ArrayGrow(len) => {
                let from = self.array.len();
                self.array.extend((from..*len).map(|index| index as u32));
            }
            Op::ArraySet(at, value) => {
                if let Some(at) = at.checked_rem(self.array.len()) {
                    self.array[at] = *value;
                }
            }
            Op::MatrixGrow(rows, columns) => {
                self.columns = self.columns.max(*columns);
                let rows = self.matrix.len().max(*rows);
                self.matrix.resize(rows, Vec::new());
                for row in &mut self.matrix {
                    row.resize(self.columns, 7);
                }
            }
            Op::MatrixSet(row, column, value) => {
                let rows = self.matrix.len();
                if rows * self.columns > 0 {
                    self.matrix[row % rows][column % self.columns] = *value;
                }
            }
            Op::Append(bytes) => self.buffer.extend(bytes),
            Op::Delete(some) => {
                let some = (*some).min(self.buffer.len());
                self.buffer.drain(..some);
                self.deleted += some as u64;
            }
            Op::Die { .. } => unreachable!("not in these"),
        }
    }
}

/// A place between two characters.
fn place(text: &str, at: usize) -> usize {
    let places = text.chars().count() + 1;
    let mut ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    ends.nth(at % places).unwrap_or(0)
}

fn simple_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => any::<u32>().prop_map(Op::Push),
        2 => Just(Op::Pop),
        3 => any::<(usize, u32)>().prop_map(|(at, value)| Op::Insert(at, value)),
        2 => any::<usize>().prop_map(Op::Remove),
        1 => (2..6_u32).prop_map(Op::Retain),
        1 => (0..60_usize).prop_map(Op::Truncate),
        2 => prop::collection::vec(any::<u32>(), 0..50).prop_map(Op::Extend),
        1 => (0..100_usize).prop_map(Op::Reserve),
        1 => Just(Op::ShrinkToFit),
        3 => "[a-zäß€]{0,20}".prop_map(Op::PushText),
        2 => (any::<usize>(), "[a-zäß€]{0,9}").prop_map(|(at, more)| Op::InsertText(at, more)),
        2 => Just(Op::PopText),
        1 => Just(Op::ClearText),
        4 => any::<u32>().prop_map(Op::ArrayPush),
        1 => (0..150_usize).prop_map(Op::ArrayGrow),
        3 => any::<(usize, u32)>().prop_map(|(at, value)| Op::ArraySet(at, value)),
        1 => (0..9_usize, 0..9_usize).prop_map(|(rows, columns)| Op::MatrixGrow(rows, columns)),
        2 => any::<(usize, usize, u32)>().prop_map(|(row, column, value)| Op::MatrixSet(row, column, value)),
        5 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Op::Append),
        3 => (0..250_usize).prop_map(Op::Delete),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => simple_op(),
        1 => (prop::collection::vec(simple_op(), 1..12), 1..90_u64)
            .prop_map(|(ops, at)| Op::Die { ops, at }),
    ]
}

fn collections_match_those_of_std() {
    let seed = number("NETMCORE_SEED").unwrap_or_else(process::random_u64);
    let cases = number("NETMCORE_CASES").unwrap_or(150);
    eprintln!("replay: NETMCORE_SEED={seed} NETMCORE_CASES={cases}");
    let mut runner = TestRunner::new(Config {
        cases: cases as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    });
    let checked = runner.run(&prop::collection::vec(op(), 1..100), |ops| {
        let world = World::new();
        let mut model = Model::default();
        for op in ops {
            match op {
                Op::Die { ops, at } => model = die(&world, model, &ops, at),
                op => {
                    world.apply(&op);
                    model.apply(&op);
                }
            }
            assert_eq!(world.look(), model);
        }
        world.heap.verify().unwrap();
        let heap = world.heap.clone();
        drop(world);
        assert!(heap.shared_values().unwrap().is_empty());
        heap.verify().unwrap();
        Ok(())
    });
    if let Err(failure) = checked {
        panic!("{failure}");
    }
}

/// A child does them and may be killed in the middle: it is as after the first of them, or after one more; so after some.
fn die(world: &World, mut model: Model, ops: &[Op], at: u64) -> Model {
    crash::arm(Some(at));
    let child = fork(|| ops.iter().for_each(|op| world.apply(op)));
    let ended_well = child.ended_well();
    crash::disarm();
    world.heap.verify().unwrap();
    let found = world.look();
    let mut matches = found == model && !ended_well;
    for op in ops {
        if matches {
            break;
        }
        model.apply(op);
        matches = found == model && !ended_well;
    }
    let died_at = crash::died_at();
    assert!(
        matches || (ended_well && found == model),
        "{died_at:?}: {found:?} after some of {ops:?}"
    );
    // What it had claimed for writing is told, and free.
    world.array.take_abandoned();
    found
}

netmcore_forktest::forktests!(collections_match_those_of_std);

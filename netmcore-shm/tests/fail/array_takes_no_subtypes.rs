use netmcore_shm::collections::{ArraySliceMut, MatrixBlockMut};
use netmcore_shm::{ShmArray, ShmMatrix};
use std::marker::PhantomData;

type General = PhantomData<for<'a> fn(&'a u8)>;
type Special = PhantomData<fn(&'static u8)>;

fn array(of: &ShmArray<General>) -> &ShmArray<Special> {
    of
}

fn matrix(of: &ShmMatrix<General>) -> &ShmMatrix<Special> {
    of
}

fn slice<'a>(of: ArraySliceMut<'a, General>) -> ArraySliceMut<'a, Special> {
    of
}

fn block<'a>(of: MatrixBlockMut<'a, General>) -> MatrixBlockMut<'a, Special> {
    of
}

fn main() {}

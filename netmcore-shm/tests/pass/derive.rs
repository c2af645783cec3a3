use netmcore_shm::{HeapRef, ShmSafe};
use std::marker::PhantomData;
use std::sync::atomic::AtomicU64;

#[derive(ShmSafe)]
struct Unit;

#[derive(ShmSafe)]
struct Tuple(u8, [f64; 3], Option<HeapRef>);

#[derive(ShmSafe)]
#[repr(C, align(64))]
struct Generic<T, const N: usize = 4>
where
    T: Clone,
{
    items: [T; N],
    count: AtomicU64,
    kind: PhantomData<String>,
}

#[derive(ShmSafe)]
#[shm_safe(bound = "")]
struct Tag<T: Send + 'static>(PhantomData<T>);

#[derive(ShmSafe)]
#[repr(u8)]
enum State<T> {
    Free,
    Held(T, u32),
    Moved { to: HeapRef, at: std::time::Instant },
}

#[derive(ShmSafe)]
enum Never {}

#[derive(ShmSafe)]
struct Raw {
    r#type: u8,
}

mod elsewhere {
    pub mod shm {
        pub use netmcore_shm::ShmSafe;
    }
}

#[derive(elsewhere::shm::ShmSafe)]
#[shm_safe(crate = crate::elsewhere::shm)]
struct ByPath(u64);

#[derive(elsewhere::shm::ShmSafe)]
#[shm_safe(crate = "crate::elsewhere::shm")]
struct ByPathInQuotes(u64);

// Names in a type that is given to a macro are different ones from those in the macro.
macro_rules! written_by_a_macro {
    ($name:ident, $kind:ident, $($variant:ident: $field:ident),*) => {
        #[derive(ShmSafe)]
        struct $name {
            one: $kind,
        }

        #[derive(ShmSafe)]
        enum Either {
            $($variant($field)),*
        }
    };
}

written_by_a_macro!(Written, HeapRef, Left: u8, Right: HeapRef);

#[derive(ShmSafe)]
#[shm_safe(bound = "")]
struct TagOfAny<T: ?Sized + Send + 'static>(PhantomData<T>);

fn put<T: ShmSafe>() -> bool {
    T::HAS_POINTERS
}

fn main() {
    assert!(!put::<Unit>());
    assert!(put::<Tuple>());
    assert!(!put::<Generic<u8, 2>>());
    assert!(put::<State<u8>>());
    assert!(!put::<Tag<String>>());
    assert!(!put::<Never>());
    assert!(!put::<Raw>());
    assert!(!put::<ByPath>() && !put::<ByPathInQuotes>());
    assert!(put::<Written>() && put::<Either>());
    assert!(!put::<TagOfAny<str>>());
    let _ = (Raw { r#type: 1 }.r#type, ByPath(1).0);
}

//! How arguments, results and messages become bytes: the only file that names bincode.
//!
//! **Format.** [`Codec::Bincode`] is bincode 1.3 with fixed-width little-endian integers; lengths are 64-bit. It is not
//! self-describing: reader and writer must agree on the type, which holds here because every process is a fork of one
//! image. [`Codec::Json`] is for types whose `Deserialize` asks the data what comes next.
//!
//! **Protocol.** [`encode`] first computes the exact size, then asks for a place of that size (a block of shared
//! memory, usually), then writes straight into it: no intermediate copy with bincode. A value that changes its size
//! between the two passes is an error, not an overrun. [`decode`] must use up all bytes.
//!
//! **Why bincode 1.3.** Version 3 is an empty release; 1.3.3 and 2.0.1 are both unmaintained (RUSTSEC-2025-0141; this
//! file is the only one to change when a successor is chosen). Measured through serde, with fixed-width integers,
//! nanoseconds, on 2 virtual cores under Linux 6.18:
//!
//! | value | bytes | encode, 1.3.3 | 2.0.1 | decode, 1.3.3 | 2.0.1 |
//! |---|---|---|---|---|---|
//! | struct of five numbers | 23 | 2.4 | 2.2 | 1.9 | 2.2 |
//! | enum with four ids | 56 | 6.0 | 4.1 | 15 | 20 |
//! | enum with a text | 53 | 3.8 | 4.1 | 28 | 30 |
//! | ten strings and numbers | 218 | 35 | 34 | 194 | 212 |
//! | 1000 `f64` | 8008 | 154 | 154 | 870 | 870 |
//! | 1000 `u8` | 1008 | 27 | 27 | 560 | 850 |
//!
//! "Encode" is what [`encode`] does: size, then write in place. 2.0.1 into a growing `Vec` takes 29 to 146 ns for the first
//! four, 1.3.3 takes 9 to 51.
//!
//! **Limits.** The slice is the limit: no length read from it is believed beyond the bytes that are there. (The number
//! of elements that take no bytes, as in `Vec<()>`, has no such limit; no message of ours has such elements.)

use std::fmt;
use std::io;

use bincode::Options as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::manage;

/// How values are turned into bytes on their way to another process.
///
/// ```
/// use netmcore_proc::Codec;
///
/// assert_eq!(Codec::default(), Codec::Bincode);
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum Codec {
    /// Compact and fast; right for all types that do not describe themselves.
    #[default]
    Bincode,
    /// Slower, and right for self-describing types: `serde_json::Value`, enums that are untagged or internally tagged,
    /// structs with `flatten` or `skip_serializing_if`. Map keys must be strings or numbers; infinities and NaN are
    /// lost.
    Json,
}

impl Codec {
    /// How a slot names it.
    pub(crate) fn number(self) -> u32 {
        match self {
            Codec::Bincode => 0,
            Codec::Json => 1,
        }
    }

    /// What a slot names; the default for a number that names none.
    pub(crate) fn from_number(number: u32) -> Codec {
        match number {
            1 => Codec::Json,
            _ => Codec::Bincode,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Codec::Bincode => "bincode",
            Codec::Json => "JSON",
        })
    }
}

/// A value that did not become bytes, or bytes that did not become a value of the type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CodecError {
    pub(crate) type_name: &'static str,
    /// What the codec said.
    pub(crate) reason: String,
    /// What the user may do about it.
    pub(crate) hint: Option<&'static str>,
}

impl CodecError {
    /// Returns the reason followed by the hint: what an error that names the type itself shows.
    pub(crate) fn reason_and_hint(&self) -> String {
        match self.hint {
            Some(hint) => format!("{}; {hint}", self.reason),
            None => self.reason.clone(),
        }
    }
}

impl fmt::Display for CodecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.type_name, self.reason_and_hint())
    }
}

impl std::error::Error for CodecError {}

/// Why [`encode`] failed: the value, or the place it should have gone to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum EncodeError<E> {
    Codec(CodecError),
    Place(E),
}

/// Encodes `value` into a place of exactly the right size, which `place` provides once it is told the size in bytes.
///
/// Returns the filled place. When encoding fails after the place was provided, the place is dropped: a place that is
/// more than memory frees itself in its `Drop`.
pub(crate) fn encode<T, B, E>(
    codec: Codec,
    value: &T,
    place: impl FnOnce(usize) -> Result<B, E>,
) -> Result<B, EncodeError<E>>
where
    T: Serialize + ?Sized,
    B: AsMut<[u8]>,
{
    match codec {
        Codec::Bincode => {
            let size = manage::measuring(|| bincode_options().serialized_size(value))
                .map_err(|error| EncodeError::Codec(bincode_error::<T>(&error, Doing::Encode)))?;
            let Ok(size) = usize::try_from(size) else {
                return Err(EncodeError::Codec(CodecError {
                    type_name: std::any::type_name::<T>(),
                    reason: format!("its encoding has {size} bytes, more than memory can hold"),
                    hint: None,
                }));
            };
            let mut place = place(size).map_err(EncodeError::Place)?;
            let mut filler = Filler {
                place: exactly(place.as_mut(), size),
                filled_bytes: 0,
            };
            let written = bincode_options().serialize_into(&mut filler, value);
            let is_full = filler.filled_bytes == filler.place.len();
            match written {
                Ok(()) if is_full => Ok(place),
                Ok(()) => Err(EncodeError::Codec(size_changed::<T>())),
                Err(error) => Err(EncodeError::Codec(match *error {
                    bincode::ErrorKind::Io(ref io) if io.kind() == io::ErrorKind::WriteZero => {
                        size_changed::<T>()
                    }
                    _ => bincode_error::<T>(&error, Doing::Encode),
                })),
            }
        }
        Codec::Json => {
            let bytes = serde_json::to_vec(value)
                .map_err(|error| EncodeError::Codec(json_error::<T>(&error, Doing::Encode)))?;
            let mut place = place(bytes.len()).map_err(EncodeError::Place)?;
            exactly(place.as_mut(), bytes.len()).copy_from_slice(&bytes);
            Ok(place)
        }
    }
}

/// Encodes `value` into private memory.
pub(crate) fn encode_to_vec<T: Serialize + ?Sized>(
    codec: Codec,
    value: &T,
) -> Result<Vec<u8>, CodecError> {
    let place = |size| Ok::<_, std::convert::Infallible>(vec![0; size]);
    encode(codec, value, place).map_err(|error| match error {
        EncodeError::Codec(error) => error,
        EncodeError::Place(never) => match never {},
    })
}

/// Decodes a value from exactly these bytes.
pub(crate) fn decode<T: DeserializeOwned>(codec: Codec, bytes: &[u8]) -> Result<T, CodecError> {
    match codec {
        Codec::Bincode => bincode_options()
            .deserialize(bytes)
            .map_err(|error| bincode_error::<T>(&error, Doing::Decode)),
        Codec::Json => {
            serde_json::from_slice(bytes).map_err(|error| json_error::<T>(&error, Doing::Decode))
        }
    }
}

/// The one configuration: fixed-width little-endian integers, no limit but the slice, no bytes left over.
fn bincode_options() -> impl bincode::Options {
    bincode::DefaultOptions::new().with_fixint_encoding()
}

/// Writes into a place from its start on. `&mut [u8]` does the same, but was measured three to a hundred times slower
/// under bincode.
struct Filler<'a> {
    place: &'a mut [u8],
    filled_bytes: usize,
}

impl io::Write for Filler<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    /// Writes all or nothing.
    #[inline]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let rest = self.place.get_mut(self.filled_bytes..);
        let Some(next) = rest.and_then(|rest| rest.get_mut(..bytes.len())) else {
            return Err(io::ErrorKind::WriteZero.into());
        };
        next.copy_from_slice(bytes);
        self.filled_bytes += bytes.len();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// # Panics
///
/// When `place` is shorter than what was asked for: then the provider of places is wrong, not the value.
fn exactly(place: &mut [u8], size_bytes: usize) -> &mut [u8] {
    let len = place.len();
    place.get_mut(..size_bytes).unwrap_or_else(|| {
        panic!("a place of {size_bytes} bytes was asked for, and one of {len} bytes given")
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Encode,
    Decode,
}

const NEEDS_JSON: &str = "the bincode codec cannot carry types that describe themselves (serde_json::Value, enums that \
    are untagged or internally tagged, `flatten`): use Codec::Json";
const MAY_NEED_JSON: &str = "if the type describes itself (serde_json::Value, enums that are untagged or internally \
    tagged, `flatten`, `skip_serializing_if`), use Codec::Json";
/// How the messages begin that `serde::de::Error` and derived implementations make when bytes do not fit the type.
const SERDES_OWN: [&str; 8] = [
    "invalid type",
    "invalid value",
    "invalid length",
    "unknown variant",
    "unknown field",
    "missing field",
    "duplicate field",
    "data did not match",
];
const NEEDS_BINCODE: &str =
    "JSON takes only strings and numbers as keys of a map: use Codec::Bincode";

fn bincode_error<T: ?Sized>(error: &bincode::Error, doing: Doing) -> CodecError {
    use bincode::ErrorKind;
    let (reason, hint) = match &**error {
        ErrorKind::DeserializeAnyNotSupported => (
            "the type asks the data what comes next, and bincode data does not say".into(),
            Some(NEEDS_JSON),
        ),
        ErrorKind::SequenceMustHaveLength => (
            "the number of elements is not known before they are written".into(),
            Some(NEEDS_JSON),
        ),
        ErrorKind::Io(io) if io.kind() == io::ErrorKind::UnexpectedEof => (
            "the bytes end before the value does".into(),
            Some(MAY_NEED_JSON),
        ),
        ErrorKind::Custom(message)
            if message == "Slice had bytes remaining after deserialization" =>
        {
            (
                "bytes are left over behind the value".into(),
                Some(MAY_NEED_JSON),
            )
        }
        // What a type says of its own, as a handle does of a region that is not here, is the whole reason.
        ErrorKind::Custom(message) => {
            let is_of_serde = SERDES_OWN.iter().any(|begin| message.starts_with(begin));
            let hint = (doing == Doing::Decode && is_of_serde).then_some(MAY_NEED_JSON);
            (message.clone(), hint)
        }
        other => (
            other.to_string(),
            (doing == Doing::Decode).then_some(MAY_NEED_JSON),
        ),
    };
    CodecError {
        type_name: std::any::type_name::<T>(),
        reason,
        hint,
    }
}

fn json_error<T: ?Sized>(error: &serde_json::Error, doing: Doing) -> CodecError {
    let reason = error.to_string();
    let hint =
        (doing == Doing::Encode && reason == "key must be a string").then_some(NEEDS_BINCODE);
    CodecError {
        type_name: std::any::type_name::<T>(),
        reason,
        hint,
    }
}

fn size_changed<T: ?Sized>() -> CodecError {
    CodecError {
        type_name: std::any::type_name::<T>(),
        reason: "its encoding changed its size while it was written".into(),
        hint: Some("a value must not change while it is sent"),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
    enum Shape {
        Nothing,
        Numbers(u8, i16, u32, i64, u128, char, bool),
        Named {
            text: String,
            parts: Vec<Option<Shape>>,
        },
        Map(BTreeMap<String, Vec<u8>>),
    }

    fn shape() -> impl Strategy<Value = Shape> {
        let leaf = prop_oneof![
            Just(Shape::Nothing),
            any::<(u8, i16, u32, i64, u128, char, bool)>()
                .prop_map(|(a, b, c, d, e, f, g)| Shape::Numbers(a, b, c, d, e, f, g)),
            prop::collection::btree_map(".{0,5}", prop::collection::vec(any::<u8>(), 0..5), 0..4)
                .prop_map(Shape::Map),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            (
                ".{0,9}",
                prop::collection::vec(prop::option::of(inner), 0..4),
            )
                .prop_map(|(text, parts)| Shape::Named { text, parts })
        })
    }

    fn message<T: fmt::Debug>(result: Result<T, CodecError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn place_has_exactly_the_right_size() {
        for (codec, text) in [(Codec::Bincode, 8 + 2), (Codec::Json, 4)] {
            let mut asked = Vec::new();
            let place = |size| {
                asked.push(size);
                Ok::<_, ()>(vec![0xff_u8; size])
            };
            assert!(encode(codec, "hi", place).is_ok());
            assert_eq!(asked, [text]);
        }
        assert_eq!(
            encode_to_vec(Codec::Bincode, &(1_u16, Some(2_u8))).unwrap(),
            [1, 0, 1, 2]
        );
    }

    #[test]
    fn place_may_be_longer_than_asked_for() {
        let place = |size| Ok::<_, ()>(vec![0xff_u8; size + 3]);
        let filled = encode(Codec::Bincode, &7_u16, place).unwrap();
        assert_eq!(filled, [7, 0, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn failure_of_the_place_is_passed_on() {
        for codec in [Codec::Bincode, Codec::Json] {
            let no_place = |size| Err::<Vec<u8>, _>(size);
            assert!(matches!(
                encode(codec, &7_u16, no_place),
                Err(EncodeError::Place(1 | 2))
            ));
        }
    }

    #[test]
    fn self_describing_types_get_the_advice() {
        #[derive(Debug, Serialize, Deserialize)]
        #[serde(tag = "kind")]
        enum Tagged {
            A { x: u8 },
        }
        #[derive(Debug, Serialize, Deserialize)]
        struct Flattened {
            a: u8,
            #[serde(flatten)]
            rest: BTreeMap<String, u8>,
        }
        let tagged = encode_to_vec(Codec::Bincode, &Tagged::A { x: 1 }).unwrap();
        assert_eq!(
            message(decode::<Tagged>(Codec::Bincode, &tagged)),
            "netmcore_proc::codec::tests::self_describing_types_get_the_advice::Tagged: the type asks the data what \
             comes next, and bincode data does not say; the bincode codec cannot carry types that describe themselves \
             (serde_json::Value, enums that are untagged or internally tagged, `flatten`): use Codec::Json"
        );
        let rest = BTreeMap::from([("b".to_string(), 2)]);
        assert_eq!(
            message(encode_to_vec(Codec::Bincode, &Flattened { a: 1, rest })),
            "netmcore_proc::codec::tests::self_describing_types_get_the_advice::Flattened: the number of elements is \
             not known before they are written; the bincode codec cannot carry types that describe themselves \
             (serde_json::Value, enums that are untagged or internally tagged, `flatten`): use Codec::Json"
        );
        let json = encode_to_vec(Codec::Json, &Tagged::A { x: 1 }).unwrap();
        assert!(matches!(decode(Codec::Json, &json), Ok(Tagged::A { x: 1 })));
    }

    #[test]
    fn wrong_bytes_are_refused_with_the_type() {
        assert_eq!(
            message(decode::<u32>(Codec::Bincode, &[1, 2, 3])),
            "u32: the bytes end before the value does; if the type describes itself (serde_json::Value, enums that \
             are untagged or internally tagged, `flatten`, `skip_serializing_if`), use Codec::Json"
        );
        assert_eq!(
            message(decode::<u8>(Codec::Bincode, &[1, 2])),
            "u8: bytes are left over behind the value; if the type describes itself (serde_json::Value, enums that \
             are untagged or internally tagged, `flatten`, `skip_serializing_if`), use Codec::Json"
        );
        assert_eq!(
            message(decode::<u8>(Codec::Json, b"1 2")),
            "u8: trailing characters at line 1 column 3"
        );
        assert_eq!(
            message(encode_to_vec(Codec::Json, &BTreeMap::from([((1, 2), 3)]))),
            "alloc::collections::btree::map::BTreeMap<(i32, i32), i32>: key must be a string; JSON takes only strings \
             and numbers as keys of a map: use Codec::Bincode"
        );
    }

    #[test]
    fn hint_does_not_follow_what_a_type_says_of_its_own() {
        #[derive(Debug)]
        struct Refusing;
        impl<'de> Deserialize<'de> for Refusing {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                u8::deserialize(from)?;
                Err(serde::de::Error::custom("region 7 is not inherited"))
            }
        }
        assert!(
            message(decode::<Refusing>(Codec::Bincode, &[1]))
                .ends_with("::Refusing: region 7 is not inherited")
        );
        // The first variant has number 0; there is no fifth.
        let misfit = message(decode::<Shape>(Codec::Bincode, &[4, 0, 0, 0]));
        assert!(misfit.contains("invalid value"), "{misfit}");
        assert!(misfit.ends_with(MAY_NEED_JSON), "{misfit}");
    }

    #[test]
    fn length_beyond_the_bytes_takes_no_memory() {
        let claim = u64::MAX.to_le_bytes();
        assert!(decode::<String>(Codec::Bincode, &claim).is_err());
        assert!(decode::<Vec<u64>>(Codec::Bincode, &claim).is_err());
        let claim = (1_u64 << 40).to_le_bytes();
        assert!(decode::<Vec<[u64; 16]>>(Codec::Bincode, &claim).is_err());
    }

    #[test]
    fn value_that_changes_its_size_is_an_error() {
        /// Longer, or shorter, each time it is looked at.
        struct Restless {
            len: Cell<usize>,
            step: isize,
        }
        impl Serialize for Restless {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let len = self.len.get();
                self.len.set(len.wrapping_add_signed(self.step));
                to.serialize_str(&"x".repeat(len))
            }
        }
        for step in [1, -1] {
            let len = Cell::new(5);
            let restless = Restless { len, step };
            assert_eq!(
                message(encode_to_vec(Codec::Bincode, &restless)),
                "netmcore_proc::codec::tests::value_that_changes_its_size_is_an_error::Restless: its encoding changed \
                 its size while it was written; a value must not change while it is sent"
            );
        }
    }

    #[test]
    fn failed_value_drops_its_place() {
        struct Place<'a>(Vec<u8>, &'a Cell<bool>);
        impl AsMut<[u8]> for Place<'_> {
            fn as_mut(&mut self) -> &mut [u8] {
                &mut self.0
            }
        }
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                self.1.set(true);
            }
        }
        /// Is measured well, and then fails.
        struct Second(Cell<bool>);
        impl Serialize for Second {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if self.0.replace(true) {
                    return Err(serde::ser::Error::custom("not twice"));
                }
                to.serialize_u64(1)
            }
        }
        let dropped = Cell::new(false);
        let place = |size| Ok::<_, ()>(Place(vec![0; size], &dropped));
        let Err(EncodeError::Codec(error)) =
            encode(Codec::Bincode, &Second(Cell::new(false)), place)
        else {
            panic!("it was encoded");
        };
        assert_eq!(error.reason_and_hint(), "not twice");
        assert!(dropped.get());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn values_come_back(value in shape()) {
            for codec in [Codec::Bincode, Codec::Json] {
                let bytes = encode_to_vec(codec, &value).unwrap();
                prop_assert_eq!(decode::<Shape>(codec, &bytes), Ok(value.clone()));
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            for codec in [Codec::Bincode, Codec::Json] {
                let _ = decode::<Shape>(codec, &bytes);
                let _ = decode::<Vec<Shape>>(codec, &bytes);
            }
        }
    }
}

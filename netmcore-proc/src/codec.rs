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
//! **Limits.** The slice is the limit: no length read from it is believed beyond the bytes that are there.

#![allow(dead_code)]

use std::fmt;
use std::io;

use bincode::Options as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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
            let size = bincode_options()
                .serialized_size(value)
                .map_err(|error| EncodeError::Codec(bincode_error::<T>(&error, Doing::Encode)))?;
            let Ok(size) = usize::try_from(size) else {
                return Err(EncodeError::Codec(CodecError {
                    type_name: std::any::type_name::<T>(),
                    reason: format!("its encoding has {size} bytes, more than memory can hold"),
                    hint: None,
                }));
            };
            let mut place = place(size).map_err(EncodeError::Place)?;
            let mut rest = exactly(place.as_mut(), size);
            let written = bincode_options().serialize_into(&mut rest, value);
            let unused = rest.len();
            match written {
                Ok(()) if unused == 0 => Ok(place),
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

const NEEDS_JSON: &str = "the type describes itself (as serde_json::Value, untagged and internally tagged enums, and \
    `flatten` do), which the bincode codec cannot do; define the process with Codec::Json";
const MAY_NEED_JSON: &str = "if the type describes itself (serde_json::Value, untagged or internally tagged enums, \
    `flatten`, `skip_serializing_if`), define the process with Codec::Json";
const NEEDS_BINCODE: &str =
    "JSON takes only strings and numbers as map keys; define the process with Codec::Bincode";

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
        ErrorKind::Custom(message) => (
            message.clone(),
            (doing == Doing::Decode).then_some(MAY_NEED_JSON),
        ),
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

//! Values whose type is known only at run time: wrapped with their type, unwrapped at that type or not at all.
//!
//! For processes that take arguments of several types, or pass on values that they do not look into.
//!
//! **Identity.** A value is unwrapped only at exactly the type that it was wrapped with: the same `TypeId`, and the same
//! type name. Both hold for one image, which all processes of a program are forks of. A value kept in a file does not
//! unwrap in another build.

use std::any::{TypeId, type_name};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec::{Codec, decode, encode_to_vec};
use crate::error::{Error, Result};

/// A value of any type that can travel, with its type: the ancestor's `encap`.
///
/// ```
/// use netmcore_proc::{Error, dynamic::Encap};
///
/// let encap = Encap::wrap(&vec![1_u32, 2, 3])?;
/// assert_eq!(encap.unwrap::<Vec<u32>>()?, [1, 2, 3]);
///
/// // Not even at a type with the same encoding:
/// let error = encap.unwrap::<Vec<i32>>().unwrap_err();
/// assert!(matches!(error, Error::TypeMismatch { .. }));
/// # Ok::<(), Error>(())
/// ```
#[doc(alias = "encap")]
#[doc(alias = "Make_encap")]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encap {
    type_hash: u64,
    type_name: String,
    codec: Codec,
    #[serde(with = "byte_string")]
    bytes: Vec<u8>,
}

impl Encap {
    /// Wraps a value, encoded by the default codec.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`] when the value cannot travel.
    pub fn wrap<T: Serialize + 'static>(value: &T) -> Result<Encap> {
        Encap::wrap_with(Codec::default(), value)
    }

    /// Wraps a value, encoded by this codec: [`Codec::Json`] for types that describe themselves. The receiver need
    /// not know.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`] when the value cannot travel.
    pub fn wrap_with<T: Serialize + 'static>(codec: Codec, value: &T) -> Result<Encap> {
        let bytes = encode_to_vec(codec, value).map_err(|error| error.into_encode())?;
        Ok(Encap {
            type_hash: type_hash::<T>(),
            type_name: type_name::<T>().into(),
            codec,
            bytes,
        })
    }

    /// Says whether the value was wrapped as a `T`.
    pub fn is<T: 'static>(&self) -> bool {
        self.type_hash == type_hash::<T>() && self.type_name == type_name::<T>()
    }

    /// Returns the value, which may be asked for any number of times.
    ///
    /// # Errors
    ///
    /// [`Error::TypeMismatch`] when it was wrapped as another type; [`Error::Decode`] when the type does not read what
    /// it wrote (types that describe themselves do not with the default codec).
    pub fn unwrap<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        if !self.is::<T>() {
            let expected = type_name::<T>();
            let found = if self.type_name == expected {
                format!("another {expected}, of the same name, or of another build of the program")
            } else {
                self.type_name.clone()
            };
            return Err(Error::TypeMismatch { expected, found });
        }
        decode(self.codec, &self.bytes).map_err(|error| error.into_decode())
    }

    /// Returns the name of the type that the value was wrapped as, for messages.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }

    /// Returns the length of the encoded value in bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl fmt::Debug for Encap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Encap({}, {} bytes)", self.type_name, self.bytes.len())
    }
}

/// The same in all processes of one image: the hasher has no keys of its own.
fn type_hash<T: 'static>() -> u64 {
    let mut hasher = DefaultHasher::new();
    TypeId::of::<T>().hash(&mut hasher);
    hasher.finish()
}

/// Bytes as one string of bytes, not as a sequence of numbers one by one.
mod byte_string {
    use std::fmt;

    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        from.deserialize_byte_buf(Bytes)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }

        /// JSON has no bytes.
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u8>, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = seq.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn value_comes_back_at_its_own_type_only() {
        let encap = Encap::wrap(&7_u64).unwrap();
        assert!(encap.is::<u64>() && !encap.is::<i64>());
        assert_eq!(encap.unwrap::<u64>().unwrap(), 7);
        assert_eq!(encap.unwrap::<u64>().unwrap(), 7);
        assert_eq!(encap.type_name(), "u64");
        assert_eq!(
            message(encap.unwrap::<i64>()),
            "cannot unwrap a value as i64: it was wrapped as u64"
        );
        assert_eq!(format!("{encap:?}"), "Encap(u64, 8 bytes)");
    }

    #[test]
    fn types_of_the_same_name_are_told_apart() {
        let encap = {
            #[derive(Serialize)]
            struct Local(u8);
            Encap::wrap(&Local(1)).unwrap()
        };
        #[derive(Deserialize, Debug)]
        struct Local(#[expect(dead_code)] u8);
        assert_eq!(encap.type_name(), type_name::<Local>());
        let name = "netmcore_proc::dynamic::tests::types_of_the_same_name_are_told_apart::Local";
        assert_eq!(
            message(encap.unwrap::<Local>()),
            format!(
                "cannot unwrap a value as {name}: it was wrapped as another {name}, of the same name, or of another \
                 build of the program"
            )
        );
    }

    #[test]
    fn encap_travels_by_both_codecs_and_nested() {
        for codec in [Codec::Bincode, Codec::Json] {
            let inner = Encap::wrap(&"text".to_string()).unwrap();
            let outer = Encap::wrap_with(codec, &inner).unwrap();
            let bytes = encode_to_vec(codec, &outer).unwrap();
            let outer: Encap = decode(codec, &bytes).unwrap();
            let inner: Encap = outer.unwrap().unwrap();
            assert_eq!(inner.unwrap::<String>().unwrap(), "text");
        }
    }

    #[test]
    fn self_describing_value_needs_the_json_codec() {
        let value = serde_json::json!({ "a": [1, "b"] });
        let by_default = Encap::wrap(&value).unwrap();
        assert_eq!(
            message(by_default.unwrap::<serde_json::Value>()),
            "cannot read a value of type serde_json::value::Value: the type asks the data what comes next, and bincode \
             data does not say; the bincode codec cannot carry types that describe themselves (serde_json::Value, enums \
             that are untagged or internally tagged, `flatten`): use Codec::Json"
        );
        let by_json = Encap::wrap_with(Codec::Json, &value).unwrap();
        assert_eq!(by_json.unwrap::<serde_json::Value>().unwrap(), value);
    }
}

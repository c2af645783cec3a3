//! A valid name of a POSIX shared memory object or semaphore.
//!
//! **Invariants.** An [`ObjectName`] begins with `/`, has 2 to 255 bytes, no further `/`, no NUL, and is
//! neither `/.` nor `/..`. All other bytes are allowed; such a name is a file name in `/dev/shm`, and
//! nothing below can take it for a path elsewhere.
//!
//! **Not here.** Whether an object of this name exists: [`shm`](crate::shm), [`sem`](crate::sem).

use std::error::Error;
use std::ffi::{CStr, CString};
use std::fmt;

/// The name of a POSIX shared memory object or semaphore: `shm_overview(7)`, `sem_overview(7)`.
///
/// ```
/// use netmcore_sys::name::ObjectName;
///
/// let name = ObjectName::new("/results").unwrap();
/// assert_eq!(name.as_bytes(), b"/results");
/// assert!(ObjectName::new("/a/b").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(CString);

impl ObjectName {
    /// Most bytes of a name, the leading `/` included.
    pub const MAX_LEN_BYTES: usize = 255;
    /// Most bytes of a semaphore's name, the leading `/` included: the C library adds `sem.`.
    pub const MAX_SEMAPHORE_LEN_BYTES: usize = 251;
    /// Bytes that [`unique`](Self::unique) appends.
    pub const UNIQUE_SUFFIX_LEN_BYTES: usize = 16;

    /// Checks that `bytes` are a valid name.
    ///
    /// # Errors
    ///
    /// What is wrong with it, with the name as it was given.
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<ObjectName, NameError> {
        let bytes = bytes.as_ref();
        let reject = |problem| Err(NameError::new(bytes, problem));
        match bytes {
            [b'/', rest @ ..] => {
                if rest.is_empty() || rest == b"." || rest == b".." {
                    return reject(NameProblem::NotAFileName);
                }
                if rest.contains(&b'/') {
                    return reject(NameProblem::SecondSlash);
                }
            }
            _ => return reject(NameProblem::NoLeadingSlash),
        }
        if bytes.len() > Self::MAX_LEN_BYTES {
            return reject(NameProblem::TooLong {
                len_bytes: bytes.len(),
                limit_bytes: Self::MAX_LEN_BYTES,
            });
        }
        match CString::new(bytes) {
            Ok(name) => Ok(ObjectName(name)),
            Err(_) => reject(NameProblem::Nul),
        }
    }

    /// `prefix` followed by 16 random hexadecimal digits (64 bits from `getrandom(2)`).
    ///
    /// That nobody has the name is as good as certain, not certain: create the object exclusively.
    /// Random numbers come from the kernel, so forks of one process get different names.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), for the whole name; and the rare kernel that refuses random bytes.
    pub fn unique(prefix: &[u8]) -> Result<ObjectName, NameError> {
        let mut random = [0_u8; 8];
        let mut filled = 0;
        while filled < random.len() {
            let rest = &mut random[filled..];
            match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Err(NameError::new(prefix, NameProblem::NoRandomBytes)),
            }
        }
        let mut bytes = prefix.to_vec();
        bytes.extend_from_slice(format!("{:016x}", u64::from_ne_bytes(random)).as_bytes());
        ObjectName::new(bytes)
    }

    /// The name's bytes, the leading `/` included.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The name as the C library takes it.
    pub fn as_c_str(&self) -> &CStr {
        &self.0
    }

    /// Checks that a semaphore can have this name: at most 251 bytes.
    ///
    /// # Errors
    ///
    /// [`NameProblem::TooLong`].
    pub fn for_semaphore(&self) -> Result<(), NameError> {
        let len_bytes = self.as_bytes().len();
        if len_bytes > Self::MAX_SEMAPHORE_LEN_BYTES {
            let problem = NameProblem::TooLong {
                len_bytes,
                limit_bytes: Self::MAX_SEMAPHORE_LEN_BYTES,
            };
            return Err(NameError::new(self.as_bytes(), problem));
        }
        Ok(())
    }
}

impl AsRef<[u8]> for ObjectName {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// The name, with bytes that are not printable ASCII escaped as in Rust's byte strings.
impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_bytes().escape_ascii())
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Bytes that cannot be an object's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameError {
    /// The name as it was given.
    pub name: Vec<u8>,
    /// What is wrong with it.
    pub problem: NameProblem,
}

impl NameError {
    fn new(name: &[u8], problem: NameProblem) -> NameError {
        NameError {
            name: name.to_vec(),
            problem,
        }
    }
}

/// What is wrong with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameProblem {
    /// It does not begin with `/`.
    NoLeadingSlash,
    /// It has a `/` behind the first byte.
    SecondSlash,
    /// It is `/`, `/.` or `/..`.
    NotAFileName,
    /// It contains a NUL byte.
    Nul,
    /// It is longer than the kernel or the C library takes.
    TooLong {
        /// Its length, with the leading `/`.
        len_bytes: usize,
        /// The most that is allowed.
        limit_bytes: usize,
    },
    /// The kernel gave no random bytes for a unique name.
    NoRandomBytes,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "object name \"{}\" ", self.name.escape_ascii())?;
        match self.problem {
            NameProblem::NoLeadingSlash => f.write_str("does not begin with a slash"),
            NameProblem::SecondSlash => f.write_str("has more than one slash"),
            NameProblem::NotAFileName => f.write_str("is not the name of a file"),
            NameProblem::Nul => f.write_str("contains a NUL byte"),
            NameProblem::TooLong {
                len_bytes,
                limit_bytes,
            } => write!(f, "has {len_bytes} bytes, more than {limit_bytes}"),
            NameProblem::NoRandomBytes => f.write_str("needs random bytes, and getrandom failed"),
        }
    }
}

impl Error for NameError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(bytes: &[u8]) -> NameProblem {
        ObjectName::new(bytes).unwrap_err().problem
    }

    #[test]
    fn invalid_names_are_refused_with_the_reason() {
        assert_eq!(problem(b""), NameProblem::NoLeadingSlash);
        assert_eq!(problem(b"a"), NameProblem::NoLeadingSlash);
        assert_eq!(problem(b"/"), NameProblem::NotAFileName);
        assert_eq!(problem(b"/."), NameProblem::NotAFileName);
        assert_eq!(problem(b"/.."), NameProblem::NotAFileName);
        assert_eq!(problem(b"//"), NameProblem::SecondSlash);
        assert_eq!(problem(b"/../etc"), NameProblem::SecondSlash);
        assert_eq!(problem(b"/a\0b"), NameProblem::Nul);
        let too_long = [b"/".as_slice(), &[b'x'; 255]].concat();
        assert!(matches!(
            problem(&too_long),
            NameProblem::TooLong { len_bytes: 256, .. }
        ));
    }

    #[test]
    fn odd_but_valid_names_are_taken_and_shown_escaped() {
        let name = ObjectName::new(b"/\xffa b\n").unwrap();
        assert_eq!(name.to_string(), "/\\xffa b\\n");
        assert!(ObjectName::new("/...").is_ok());
    }

    #[test]
    fn longest_names_are_taken() {
        let longest = [b"/".as_slice(), &[b'x'; 254]].concat();
        let name = ObjectName::new(&longest).unwrap();
        assert!(name.for_semaphore().is_err());
        assert!(
            ObjectName::new(&longest[..251])
                .unwrap()
                .for_semaphore()
                .is_ok()
        );
    }

    #[test]
    fn unique_names_differ_and_keep_the_prefix() {
        let a = ObjectName::unique(b"/p_").unwrap();
        let b = ObjectName::unique(b"/p_").unwrap();
        assert_ne!(a, b);
        assert!(a.as_bytes().starts_with(b"/p_"));
        assert_eq!(a.as_bytes().len(), 3 + ObjectName::UNIQUE_SUFFIX_LEN_BYTES);
        assert!(ObjectName::unique(b"p").is_err());
    }
}

//! What a failed system call reports: the call, its object, the error number.
//!
//! **Invariants.** Every error of this crate is a [`SysError`] (names that cannot be objects are
//! [`NameError`](crate::name::NameError)s); the error number is the kernel's, never translated.
//!
//! **Not here.** Outcomes that a caller expects (a deadline passed, a lock is held by another) are
//! ordinary values of the functions concerned, not errors.

use std::error::Error;
use std::fmt;
use std::io;

/// What the functions of this crate return.
pub type Result<T> = core::result::Result<T, SysError>;

/// A system call (or C library call) that failed.
///
/// ```
/// use netmcore_sys::error::{Errno, SysError};
///
/// let error = SysError::new("shm_open", "/x", Errno::ENOENT);
/// assert_eq!(error.to_string(), "shm_open of /x: No such file or directory (ENOENT)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysError {
    /// The call, as its manual page names it: `shm_open`.
    pub call: &'static str,
    /// What it was called on, for a reader: a name, a path, `descriptor 7`, `4096 bytes`. May be empty.
    pub target: String,
    /// Why it failed.
    pub errno: Errno,
}

impl SysError {
    /// An error of `call` on `target`.
    pub fn new(call: &'static str, target: impl Into<String>, errno: Errno) -> SysError {
        SysError {
            call,
            target: target.into(),
            errno,
        }
    }

    /// The error that the calling thread's last C library call left in `errno`.
    pub fn last(call: &'static str, target: impl Into<String>) -> SysError {
        SysError::new(call, target, Errno::last())
    }
}

impl fmt::Display for SysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.call)?;
        if !self.target.is_empty() {
            write!(f, " of {}", self.target)?;
        }
        write!(f, ": {}", self.errno)
    }
}

impl Error for SysError {}

/// Keeps the message and the kind; the `SysError` is the inner error
/// ([`io::Error::get_ref`]), so `raw_os_error` is `None`.
impl From<SysError> for io::Error {
    fn from(error: SysError) -> io::Error {
        io::Error::new(error.errno.kind(), error)
    }
}

/// Names the failed call and its object; formats the object only in the case of failure.
pub(crate) trait During<T> {
    /// The error, with `call` and `target` put to it.
    fn during(self, call: &'static str, target: impl fmt::Display) -> Result<T>;
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, call: &'static str, target: impl fmt::Display) -> Result<T> {
        self.map_err(|e| SysError::new(call, target.to_string(), Errno(e.raw_os_error())))
    }
}

impl<T> During<T> for io::Result<T> {
    fn during(self, call: &'static str, target: impl fmt::Display) -> Result<T> {
        self.map_err(|e| SysError::new(call, target.to_string(), Errno::from_io(&e)))
    }
}

/// An error number: `errno(3)`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The error with this number.
    pub const fn from_raw(raw: i32) -> Errno {
        Errno(raw)
    }

    /// The error that the calling thread's last C library call left in `errno`.
    pub fn last() -> Errno {
        Errno::from_io(&io::Error::last_os_error())
    }

    /// The number behind an `io::Error`; [`Errno::EIO`] for one that carries none (std makes a few
    /// of its own, such as for a NUL byte in a path: [`Errno::EINVAL`]).
    pub fn from_io(error: &io::Error) -> Errno {
        if let Some(raw) = error.raw_os_error() {
            return Errno(raw);
        }
        if let Some(inner) = error.get_ref().and_then(|e| e.downcast_ref::<SysError>()) {
            return inner.errno;
        }
        match error.kind() {
            io::ErrorKind::InvalidInput => Errno::EINVAL,
            _ => Errno::EIO,
        }
    }

    /// The number.
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// std's classification of this number.
    pub fn kind(self) -> io::ErrorKind {
        io::Error::from_raw_os_error(self.0).kind()
    }

    /// The name, as in `ENOENT`; `"E?"` for a number that Linux does not define.
    pub fn name(self) -> &'static str {
        self.describe().map_or("E?", |(name, _)| name)
    }
}

/// `No such file or directory (ENOENT)`: English in every locale.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.describe() {
            Some((name, text)) => write!(f, "{text} ({name})"),
            None => write!(f, "unknown error {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.describe() {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

macro_rules! errnos {
    ($($name:ident $text:literal,)*) => {
        impl Errno {
            $(
                #[doc = concat!($text, ".")]
                pub const $name: Errno = Errno(libc::$name);
            )*

            fn describe(self) -> Option<(&'static str, &'static str)> {
                match self {
                    $(Errno::$name => Some((stringify!($name), $text)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM "Operation not permitted",
    ENOENT "No such file or directory",
    ESRCH "No such process",
    EINTR "Interrupted system call",
    EIO "Input/output error",
    ENXIO "No such device or address",
    E2BIG "Argument list too long",
    ENOEXEC "Exec format error",
    EBADF "Bad file descriptor",
    ECHILD "No child processes",
    EAGAIN "Resource temporarily unavailable",
    ENOMEM "Cannot allocate memory",
    EACCES "Permission denied",
    EFAULT "Bad address",
    ENOTBLK "Block device required",
    EBUSY "Device or resource busy",
    EEXIST "File exists",
    EXDEV "Invalid cross-device link",
    ENODEV "No such device",
    ENOTDIR "Not a directory",
    EISDIR "Is a directory",
    EINVAL "Invalid argument",
    ENFILE "Too many open files in system",
    EMFILE "Too many open files",
    ENOTTY "Inappropriate ioctl for device",
    ETXTBSY "Text file busy",
    EFBIG "File too large",
    ENOSPC "No space left on device",
    ESPIPE "Illegal seek",
    EROFS "Read-only file system",
    EMLINK "Too many links",
    EPIPE "Broken pipe",
    EDOM "Numerical argument out of domain",
    ERANGE "Numerical result out of range",
    EDEADLK "Resource deadlock avoided",
    ENAMETOOLONG "File name too long",
    ENOLCK "No locks available",
    ENOSYS "Function not implemented",
    ENOTEMPTY "Directory not empty",
    ELOOP "Too many levels of symbolic links",
    ENOMSG "No message of desired type",
    EIDRM "Identifier removed",
    ECHRNG "Channel number out of range",
    EL2NSYNC "Level 2 not synchronized",
    EL3HLT "Level 3 halted",
    EL3RST "Level 3 reset",
    ELNRNG "Link number out of range",
    EUNATCH "Protocol driver not attached",
    ENOCSI "No CSI structure available",
    EL2HLT "Level 2 halted",
    EBADE "Invalid exchange",
    EBADR "Invalid request descriptor",
    EXFULL "Exchange full",
    ENOANO "No anode",
    EBADRQC "Invalid request code",
    EBADSLT "Invalid slot",
    EBFONT "Bad font file format",
    ENOSTR "Device not a stream",
    ENODATA "No data available",
    ETIME "Timer expired",
    ENOSR "Out of streams resources",
    ENONET "Machine is not on the network",
    ENOPKG "Package not installed",
    EREMOTE "Object is remote",
    ENOLINK "Link has been severed",
    EADV "Advertise error",
    ESRMNT "Srmount error",
    ECOMM "Communication error on send",
    EPROTO "Protocol error",
    EMULTIHOP "Multihop attempted",
    EDOTDOT "RFS specific error",
    EBADMSG "Bad message",
    EOVERFLOW "Value too large for defined data type",
    ENOTUNIQ "Name not unique on network",
    EBADFD "File descriptor in bad state",
    EREMCHG "Remote address changed",
    ELIBACC "Can not access a needed shared library",
    ELIBBAD "Accessing a corrupted shared library",
    ELIBSCN ".lib section in a.out corrupted",
    ELIBMAX "Attempting to link in too many shared libraries",
    ELIBEXEC "Cannot exec a shared library directly",
    EILSEQ "Invalid or incomplete multibyte or wide character",
    ERESTART "Interrupted system call should be restarted",
    ESTRPIPE "Streams pipe error",
    EUSERS "Too many users",
    ENOTSOCK "Socket operation on non-socket",
    EDESTADDRREQ "Destination address required",
    EMSGSIZE "Message too long",
    EPROTOTYPE "Protocol wrong type for socket",
    ENOPROTOOPT "Protocol not available",
    EPROTONOSUPPORT "Protocol not supported",
    ESOCKTNOSUPPORT "Socket type not supported",
    EOPNOTSUPP "Operation not supported",
    EPFNOSUPPORT "Protocol family not supported",
    EAFNOSUPPORT "Address family not supported by protocol",
    EADDRINUSE "Address already in use",
    EADDRNOTAVAIL "Cannot assign requested address",
    ENETDOWN "Network is down",
    ENETUNREACH "Network is unreachable",
    ENETRESET "Network dropped connection on reset",
    ECONNABORTED "Software caused connection abort",
    ECONNRESET "Connection reset by peer",
    ENOBUFS "No buffer space available",
    EISCONN "Transport endpoint is already connected",
    ENOTCONN "Transport endpoint is not connected",
    ESHUTDOWN "Cannot send after transport endpoint shutdown",
    ETOOMANYREFS "Too many references: cannot splice",
    ETIMEDOUT "Connection timed out",
    ECONNREFUSED "Connection refused",
    EHOSTDOWN "Host is down",
    EHOSTUNREACH "No route to host",
    EALREADY "Operation already in progress",
    EINPROGRESS "Operation now in progress",
    ESTALE "Stale file handle",
    EUCLEAN "Structure needs cleaning",
    ENOTNAM "Not a XENIX named type file",
    ENAVAIL "No XENIX semaphores available",
    EISNAM "Is a named type file",
    EREMOTEIO "Remote I/O error",
    EDQUOT "Disk quota exceeded",
    ENOMEDIUM "No medium found",
    EMEDIUMTYPE "Wrong medium type",
    ECANCELED "Operation canceled",
    ENOKEY "Required key not available",
    EKEYEXPIRED "Key has expired",
    EKEYREVOKED "Key has been revoked",
    EKEYREJECTED "Key was rejected by service",
    EOWNERDEAD "Owner died",
    ENOTRECOVERABLE "State not recoverable",
    ERFKILL "Operation not possible due to RF-kill",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_agree_with_the_c_library() {
        for raw in 1..134 {
            let errno = Errno::from_raw(raw);
            let c_library = io::Error::from_raw_os_error(raw).to_string();
            if let Some((_, text)) = errno.describe() {
                assert_eq!(c_library, format!("{text} (os error {raw})"));
            }
        }
        assert_eq!(Errno::from_raw(libc::EWOULDBLOCK).name(), "EAGAIN");
    }

    #[test]
    fn unknown_number_is_shown() {
        assert_eq!(Errno::from_raw(4095).to_string(), "unknown error 4095");
        assert_eq!(Errno::from_raw(4095).name(), "E?");
    }

    #[test]
    fn io_error_keeps_kind_message_and_number() {
        let error = SysError::new("open", "", Errno::EEXIST);
        let io: io::Error = error.clone().into();
        assert_eq!(io.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(io.to_string(), "open: File exists (EEXIST)");
        assert_eq!(Errno::from_io(&io), Errno::EEXIST);
    }
}

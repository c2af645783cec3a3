//! Local sockets: pairs, a listener at a path, whole messages and parts of them, who is on the other side.
//!
//! **Invariants**
//!
//! 1. Every descriptor made here is close-on-exec.
//! 2. No write raises SIGPIPE: that the other side is gone is an outcome ([`Sent::Closed`]).
//! 3. The `_nonblocking` calls never block, whatever the descriptor's mode.
//!
//! **If a process dies here**: its peer reads what was sent, then the end. A listener's path stays in the file
//! system when the listener is gone; connecting to it then is refused (`ECONNREFUSED`), and binding to it
//! is `EADDRINUSE`, until it is unlinked.
//!
//! **Not here**: what the bytes mean, where a message on a stream ends; waiting for several sockets
//! ([`crate::poll`]).
//!
//! # Safety
//!
//! Unsafe code here is one `getsockopt` into a structure of the calling frame.
#![allow(unsafe_code)]

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno as RawErrno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::error::{During, Errno, SysError};
use crate::poll;
use crate::process::Pid;

/// The longest path of a socket, in bytes. The address has 108 of them, and one is for the end.
pub const PATH_LEN_MAX_BYTES: usize = 107;

/// The most descriptors that one message carries.
pub const DESCRIPTORS_MAX: usize = 16;

/// Connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// What goes wrong with a socket at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SocketError {
    /// The path does not fit into a socket's address. Nothing was done.
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// What fits: [`PATH_LEN_MAX_BYTES`].
        limit_bytes: usize,
        /// What was asked for.
        len_bytes: usize,
    },
    /// The kernel refused.
    Sys(SysError),
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketError::PathTooLong {
                path,
                limit_bytes,
                len_bytes,
            } => write!(
                f,
                "the path {} is too long for a socket: {len_bytes} bytes, where {limit_bytes} fit; \
                 use a shorter directory",
                path.display()
            ),
            SocketError::Sys(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SocketError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            SocketError::PathTooLong { .. } => None,
            SocketError::Sys(error) => Some(error),
        }
    }
}

impl From<SysError> for SocketError {
    fn from(error: SysError) -> Self {
        SocketError::Sys(error)
    }
}

/// Checks that a path fits into a socket's address: for a program that wants to know before it begins.
///
/// # Errors
///
/// [`SocketError::PathTooLong`]; `EINVAL` for an empty path and one with a NUL byte.
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    address(path).map(drop)
}

fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > PATH_LEN_MAX_BYTES {
        return Err(SocketError::PathTooLong {
            path: path.to_owned(),
            limit_bytes: PATH_LEN_MAX_BYTES,
            len_bytes: bytes.len(),
        });
    }
    // An empty path would be an address of the abstract namespace, which anyone can take.
    if bytes.is_empty() {
        return Err(SysError::new("bind", "an empty path", Errno::EINVAL).into());
    }
    Ok(SocketAddrUnix::new(path).during("bind", path.display())?)
}

/// Makes two connected stream sockets: `socketpair(2)`. Close-on-exec, blocking.
///
/// # Errors
///
/// `EMFILE`, `ENFILE` without free descriptors; `ENOMEM`.
pub fn stream_pair() -> crate::Result<(OwnedFd, OwnedFd)> {
    pair(SocketType::STREAM)
}

/// Makes two connected sockets that keep message boundaries: `socketpair(2)` with SOCK_SEQPACKET. Close-on-exec,
/// blocking.
///
/// # Errors
///
/// As [`stream_pair`].
pub fn seqpacket_pair() -> crate::Result<(OwnedFd, OwnedFd)> {
    pair(SocketType::SEQPACKET)
}

fn pair(kind: SocketType) -> crate::Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .during("socketpair", "")
}

/// A stream socket that accepts connections at a path. Non-blocking, close-on-exec.
///
/// Dropping it closes it and leaves the path: several processes may hold the listener, and only the caller knows
/// when it has served.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Binds a new socket to `path` and listens: `bind(2)`, `listen(2)`. The path is open to the caller's user only
    /// (mode 0600, from the first instant on).
    ///
    /// # Errors
    ///
    /// [`SocketError::PathTooLong`]; `EADDRINUSE` if there is anything at the path, a dead listener's socket
    /// too; `ENOENT`, `EACCES`, `EROFS` of the directory; `EMFILE`, `ENFILE`.
    pub fn bind(path: &Path) -> Result<Listener, SocketError> {
        let address = address(path)?;
        let socket = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        // The mode of the socket, less the umask, becomes that of the path.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).during("fchmod", path.display())?;
        rustix::net::bind(&socket, &address).during("bind", path.display())?;
        rustix::net::listen(&socket, BACKLOG).during("listen", path.display())?;
        Ok(Listener(socket))
    }

    /// Takes the next connection: `accept4(2)`; `None` if there is none. The connection is non-blocking and
    /// close-on-exec.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE` without free descriptors (the connection stays in the queue, and the listener readable).
    pub fn accept_nonblocking(&self) -> crate::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            match rustix::net::accept_with(&self.0, flags) {
                Ok(connection) => return Ok(Some(connection)),
                Err(RawErrno::AGAIN) => return Ok(None),
                // The next in the queue.
                Err(RawErrno::INTR | RawErrno::CONNABORTED) => {}
                Err(errno) => return Err(errno).during("accept4", descriptor(&self.0)),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes a listening socket, moved to another number perhaps. It should be non-blocking.
impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Listener(fd)
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.0
    }
}

/// Connects to the listener at a path: `connect(2)`. The connection is blocking and close-on-exec.
///
/// # Errors
///
/// [`SocketError::PathTooLong`]; `ECONNREFUSED` if nobody listens there any more, `ENOENT` if there is no such path;
/// `EACCES`; `EMFILE`, `ENFILE`.
///
/// # Blocking
///
/// While the listener's queue is full.
pub fn connect(path: &Path) -> Result<OwnedFd, SocketError> {
    let address = address(path)?;
    let socket = stream_socket(SocketFlags::CLOEXEC)?;
    // An interrupted connect of a local socket has not begun: it was waiting for a place in the queue.
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))
        .during("connect", path.display())?;
    Ok(socket)
}

fn stream_socket(flags: SocketFlags) -> crate::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .during("socket", "")
}

/// Sets whether plain `read` and `write` on a descriptor return instead of waiting: `fcntl(F_SETFL, O_NONBLOCK)`. The
/// mode belongs to the open file: it changes for all copies of the descriptor, in forks too.
///
/// # Errors
///
/// None that Linux knows for a socket.
pub fn set_nonblocking(fd: impl AsFd, nonblocking: bool) -> crate::Result<()> {
    let fd = fd.as_fd();
    rustix::io::ioctl_fionbio(fd, nonblocking).during("ioctl(FIONBIO)", descriptor(&fd))
}

/// Who is on the other side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The process that connected, or called `listen`, or made the pair; it may have ended since, and the
    /// descriptor may be in other hands. `None` if it is in another pid namespace.
    pub pid: Option<Pid>,
    /// Its effective user id then.
    pub uid: u32,
    /// Its effective group id then.
    pub gid: u32,
}

/// Asks who is on the other side of a connection: `getsockopt(SO_PEERCRED)`. The kernel vouches for it.
///
/// # Errors
///
/// `ENOTSOCK` for another kind of descriptor.
pub fn peer_credentials(fd: impl AsFd) -> crate::Result<Credentials> {
    let fd = fd.as_fd();
    // By libc: a pid of 0, of another namespace, is no value of rustix's type.
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len_bytes = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len_bytes` bytes into `peer`, whose fields are integers.
    let failed = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len_bytes,
        )
    };
    if failed != 0 {
        return Err(SysError::last("getsockopt(SO_PEERCRED)", descriptor(&fd)));
    }
    Ok(Credentials {
        pid: Pid::new(peer.pid),
        uid: peer.uid,
        gid: peer.gid,
    })
}

/// What came of an attempt to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// This many bytes, at least one.
    Bytes(usize),
    /// Nothing yet.
    WouldBlock,
    /// Nothing ever again: the other side has closed, or died. (An empty message of a seqpacket socket
    /// looks the same; do not send any.)
    Closed,
}

/// What came of an attempt to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// This many bytes; on a stream perhaps not all.
    Bytes(usize),
    /// None: there is no room.
    WouldBlock,
    /// None: the other side has closed, or died.
    Closed,
}

/// Reads what has arrived: `recv(2)` with MSG_DONTWAIT. A message of a seqpacket socket that is longer than `buffer`
/// is cut off.
///
/// # Errors
///
/// `ENOTSOCK`, `ENOTCONN` for a wrong descriptor; `ENOMEM`.
///
/// # Panics
///
/// If `buffer` is empty: nothing read would look like the end.
pub fn receive_nonblocking(fd: impl AsFd, buffer: &mut [u8]) -> crate::Result<Received> {
    let fd = fd.as_fd();
    assert!(!buffer.is_empty(), "an empty buffer to read into");
    let result = rustix::io::retry_on_intr(|| {
        rustix::net::recv(fd, &mut *buffer, RecvFlags::DONTWAIT).map(|(_, len_bytes)| len_bytes)
    });
    received(result).during("recv", descriptor(&fd))
}

/// Writes as much as there is room for: `send(2)` with MSG_DONTWAIT. On a seqpacket socket all or nothing.
///
/// # Errors
///
/// `EMSGSIZE` for a message that never fits; `ENOTSOCK`, `ENOTCONN` for a wrong descriptor; `ENOMEM`.
pub fn send_nonblocking(fd: impl AsFd, bytes: &[u8]) -> crate::Result<Sent> {
    let fd = fd.as_fd();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sent(rustix::io::retry_on_intr(|| {
        rustix::net::send(fd, bytes, flags)
    }))
    .during("send", descriptor(&fd))
}

fn received(result: rustix::io::Result<usize>) -> rustix::io::Result<Received> {
    match result {
        // A reset is what remains of a peer that died with unread data.
        Ok(0) | Err(RawErrno::CONNRESET) => Ok(Received::Closed),
        Ok(len_bytes) => Ok(Received::Bytes(len_bytes)),
        Err(RawErrno::AGAIN) => Ok(Received::WouldBlock),
        Err(errno) => Err(errno),
    }
}

fn sent(result: rustix::io::Result<usize>) -> rustix::io::Result<Sent> {
    match result {
        Ok(len_bytes) => Ok(Sent::Bytes(len_bytes)),
        Err(RawErrno::AGAIN) => Ok(Sent::WouldBlock),
        Err(RawErrno::PIPE | RawErrno::CONNRESET) => Ok(Sent::Closed),
        Err(errno) => Err(errno),
    }
}

/// Reads what has arrived, and waits while there is nothing. Returns the number of bytes; 0 is the end.
///
/// # Errors
///
/// As [`receive_nonblocking`].
///
/// # Panics
///
/// If `buffer` is empty.
///
/// # Blocking
///
/// Until the other side writes, closes or dies.
pub fn receive(fd: impl AsFd, buffer: &mut [u8]) -> crate::Result<usize> {
    let fd = fd.as_fd();
    loop {
        match receive_nonblocking(fd, buffer)? {
            Received::Bytes(len_bytes) => return Ok(len_bytes),
            Received::Closed => return Ok(0),
            Received::WouldBlock => poll::wait_readable(fd, None)?,
        };
    }
}

/// Writes all of `bytes`. False if the other side closed or died before it was done; a part may then have arrived.
///
/// # Errors
///
/// As [`send_nonblocking`].
///
/// # Blocking
///
/// Until the other side makes room, closes or dies.
pub fn send_all(fd: impl AsFd, mut bytes: &[u8]) -> crate::Result<bool> {
    let fd = fd.as_fd();
    while !bytes.is_empty() {
        match send_nonblocking(fd, bytes)? {
            Sent::Bytes(len_bytes) => bytes = &bytes[len_bytes..],
            Sent::Closed => return Ok(false),
            Sent::WouldBlock => {
                poll::wait_writable(fd, None)?;
            }
        }
    }
    Ok(true)
}

/// Sends bytes, and with the first of them copies of descriptors: `sendmsg(2)` with SCM_RIGHTS. Never blocks.
///
/// # Errors
///
/// As [`send_nonblocking`], and `ETOOMANYREFS` if too many descriptors are on their way.
///
/// # Panics
///
/// If `bytes` is empty (the descriptors could not be received), or there are more than [`DESCRIPTORS_MAX`].
pub fn send_descriptors_nonblocking(
    fd: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> crate::Result<Sent> {
    let fd = fd.as_fd();
    assert!(!bytes.is_empty(), "descriptors need a byte to travel with");
    assert!(
        descriptors.len() <= DESCRIPTORS_MAX,
        "more than {DESCRIPTORS_MAX} descriptors"
    );
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let result = rustix::io::retry_on_intr(|| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
            debug_assert!(fits, "the space is made for {DESCRIPTORS_MAX}");
        }
        rustix::net::sendmsg(fd, &[IoSlice::new(bytes)], &mut control, flags)
    });
    sent(result).during("sendmsg", descriptor(&fd))
}

/// Reads bytes and the descriptors that came with them: `recvmsg(2)` with SCM_RIGHTS. The descriptors are
/// close-on-exec, and are put at the end of `descriptors`. Never blocks.
///
/// Descriptors that do not fit, into [`DESCRIPTORS_MAX`] or into this process's limit, are closed by the kernel and
/// reported as an error; the bytes are lost then.
///
/// # Errors
///
/// As [`receive_nonblocking`], and `EMFILE` if descriptors were dropped.
///
/// # Panics
///
/// If `buffer` is empty.
pub fn receive_descriptors_nonblocking(
    fd: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> crate::Result<Received> {
    let fd = fd.as_fd();
    assert!(!buffer.is_empty(), "an empty buffer to read into");
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, flags)
    });
    let result = match message {
        Ok(message) if message.flags.contains(rustix::net::ReturnFlags::CTRUNC) => {
            Err(RawErrno::MFILE)
        }
        other => other.map(|message| message.bytes),
    };
    if result.is_ok() {
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
    }
    received(result).during("recvmsg", descriptor(&fd))
}

fn descriptor(fd: &impl AsRawFd) -> String {
    format!("descriptor {}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    #[test]
    fn path_as_long_as_fits_is_bound_and_one_more_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let room = PATH_LEN_MAX_BYTES - dir.path().as_os_str().len() - 1;
        let longest = dir.path().join("x".repeat(room));
        let listener = Listener::bind(&longest).unwrap();
        connect(&longest).unwrap();
        assert!(listener.accept_nonblocking().unwrap().is_some());

        let too_long = dir.path().join("x".repeat(room + 1));
        let error = Listener::bind(&too_long).unwrap_err();
        assert_eq!(
            error,
            SocketError::PathTooLong {
                path: too_long.clone(),
                limit_bytes: 107,
                len_bytes: 108
            }
        );
        assert_eq!(check_path(&too_long), Err(error));
        assert!(!too_long.exists());
    }

    #[test]
    fn path_empty_or_with_nul_is_einval() {
        for path in ["", "a\0b"] {
            match check_path(Path::new(path)) {
                Err(SocketError::Sys(error)) => assert_eq!(error.errno, Errno::EINVAL),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn listener_path_is_private_and_outlives_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        let metadata = path.metadata().unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(listener.accept_nonblocking().unwrap().is_none());
        drop(listener);
        let refused = |result: SocketError| match result {
            SocketError::Sys(error) => error.errno,
            other => panic!("{other}"),
        };
        assert_eq!(refused(connect(&path).unwrap_err()), Errno::ECONNREFUSED);
        assert_eq!(
            refused(Listener::bind(&path).unwrap_err()),
            Errno::EADDRINUSE
        );
    }

    #[test]
    fn peer_of_a_pair_is_this_process() {
        let (ours, _theirs) = stream_pair().unwrap();
        let peer = peer_credentials(&ours).unwrap();
        assert_eq!(peer.pid, Some(Pid::this()));
        assert_eq!(peer.uid, crate::process::effective_uid());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(peer_credentials(&file).unwrap_err().errno, Errno::ENOTSOCK);
    }

    #[test]
    fn stream_fills_drains_and_closes() {
        let (ours, theirs) = stream_pair().unwrap();
        let mut buffer = [0; 4096];
        assert_eq!(
            receive_nonblocking(&theirs, &mut buffer).unwrap(),
            Received::WouldBlock
        );
        let mut sent_bytes = 0;
        let chunk = [7; 4096];
        loop {
            match send_nonblocking(&ours, &chunk).unwrap() {
                Sent::Bytes(len_bytes) => sent_bytes += len_bytes,
                Sent::WouldBlock => break,
                Sent::Closed => panic!("both ends are open"),
            }
        }
        drop(ours);
        let mut received_bytes = 0;
        loop {
            match receive_nonblocking(&theirs, &mut buffer).unwrap() {
                Received::Bytes(len_bytes) => received_bytes += len_bytes,
                Received::WouldBlock => panic!("the other end is closed"),
                Received::Closed => break,
            }
        }
        assert_eq!(received_bytes, sent_bytes);
        assert_eq!(
            send_nonblocking(&theirs, &chunk).unwrap(),
            Sent::Closed,
            "and no SIGPIPE"
        );
        assert!(!send_all(&theirs, &chunk).unwrap());
    }

    #[test]
    fn reset_by_a_peer_with_unread_data_is_closed() {
        let (ours, theirs) = stream_pair().unwrap();
        assert!(send_all(&ours, b"never read").unwrap());
        drop(theirs);
        assert_eq!(
            receive_nonblocking(&ours, &mut [0; 8]).unwrap(),
            Received::Closed
        );
        assert_eq!(receive(&ours, &mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn all_is_sent_while_another_reads() {
        let (ours, theirs) = stream_pair().unwrap();
        let message: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = message.clone();
        let writer = std::thread::spawn(move || send_all(&ours, &message).unwrap());
        let mut got = Vec::new();
        let mut buffer = [0; 10_000];
        loop {
            match receive(&theirs, &mut buffer).unwrap() {
                0 => break,
                len_bytes => got.extend_from_slice(&buffer[..len_bytes]),
            }
        }
        assert!(writer.join().unwrap());
        assert!(got == expected);
    }

    #[test]
    fn seqpacket_keeps_boundaries() {
        let (ours, theirs) = seqpacket_pair().unwrap();
        assert!(send_all(&ours, b"one").unwrap() && send_all(&ours, b"two").unwrap());
        let mut buffer = [0; 16];
        assert_eq!(
            receive_nonblocking(&theirs, &mut buffer).unwrap(),
            Received::Bytes(3)
        );
        assert_eq!(&buffer[..3], b"one");
    }

    #[test]
    fn descriptors_travel_with_bytes() {
        let (ours, theirs) = stream_pair().unwrap();
        let bell = poll::EventFd::new().unwrap();
        let sent = send_descriptors_nonblocking(&ours, b"bell", &[bell.as_fd()]).unwrap();
        assert_eq!(sent, Sent::Bytes(4));
        let (mut buffer, mut descriptors) = ([0; 16], Vec::new());
        let received = receive_descriptors_nonblocking(&theirs, &mut buffer, &mut descriptors);
        assert_eq!(received.unwrap(), Received::Bytes(4));
        let copy = poll::EventFd::from(descriptors.pop().unwrap());
        assert!(descriptors.is_empty());
        copy.ring().unwrap();
        assert_eq!(bell.drain().unwrap(), 1);
        let flags = rustix::io::fcntl_getfd(&copy).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

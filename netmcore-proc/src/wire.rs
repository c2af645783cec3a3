//! What workers and the command-line tool say to the master over a socket, and how it is cut into frames.
//!
//! **Format.** A connection carries frames in both directions. Numbers are little-endian.
//!
//! ```text
//! offset  bytes
//!      0      4   magic, "nmcw"
//!      4      2   version of the protocol
//!      6      2   kind: 1 a request, 2 a reply
//!      8      4   length of the body, at most 1 MiB
//!     12          body: a Request or a Reply in bincode
//! ```
//!
//! Each request gets one reply, in order. Listings come in pages, so none outgrows a frame.
//!
//! **Invariants.**
//! 1. Nothing is believed before it is checked: bytes that do not begin as a frame are refused as soon as they differ,
//!    and a length before anything is allocated for it. Memory is taken only for bytes that arrived.
//! 2. How the bytes are cut into reads makes no difference to what is decoded.
//! 3. After an error a reader gives nothing but that error: the two sides no longer agree where a frame begins. The
//!    connection is closed.
//!
//! **If a process dies here.** The other side reads the end of the stream; [`FrameReader::finish`] tells whether it came
//! in the middle of a frame, which is then as if it had never been sent.
//!
//! **Not here.** Sockets and credentials: `netmcore_sys::socket`. What requests do: the master.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{Codec, decode, encode_to_vec};
use crate::error::Error;
use crate::id::{ProcessId, ResourceId};
use crate::resource::{Leg, ResourceError, ResourceLine, ResourceRepr, ResourceType};

const MAGIC: [u8; 4] = *b"nmcw";
/// Counts up with every change of the messages below.
pub(crate) const VERSION: u16 = 3;
const HEADER_LEN_BYTES: usize = 12;
/// The longest body. Arguments and results do not travel here, so real bodies are some hundred bytes.
pub(crate) const BODY_LIMIT_BYTES: usize = 1 << 20;
/// The most lines in one page of a listing: with the longest path and all users that a line may name, a page stays
/// within the limit.
pub(crate) const PAGE_LINES: usize = 64;

/// What is asked of the master.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// The first on a connection: who asks. `None` is the command-line tool.
    Hello { process: Option<ProcessId> },
    /// Take over an object that may exist or not.
    Manage(ResourceRepr),
    /// Look up, and become a user.
    Get {
        id: ResourceId,
        expected: Option<ResourceType>,
    },
    /// Look up a region that this process is about to map; the use lasts as long as the process.
    Map { id: ResourceId },
    /// A region is not mapped here any more, and nothing refers to it.
    Unmap { id: ResourceId },
    /// Make this the heap in which named objects are, unless there is one; the reply says which it is.
    OfferHeap { id: ResourceId },
    /// Give up one use.
    Release { id: ResourceId },
    /// Give up all uses; mappings as well, when nothing in this process can look at them any more.
    ReleaseAll { with_mappings: bool },
    /// The argument or result of a process holds these; sent before the message is.
    Send {
        process: ProcessId,
        leg: Leg,
        ids: Vec<ResourceId>,
    },
    /// The receiver of a message has uses of its own now.
    Landed { process: ProcessId, leg: Leg },
    /// Send a signal to a process.
    Kill { process: ProcessId, signal: i32 },
    /// Release a fork or join point for all.
    ReleasePoint { id: ResourceId },
    /// Delete all resources.
    DestroyResources,
    /// End the run in order.
    Shutdown,
    /// List processes, those behind `after`.
    Processes { after: Option<ProcessId> },
    /// List resources, those behind `after`.
    Resources { after: Option<ResourceId> },
}

/// What the master answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Id(ResourceId),
    Repr(ResourceRepr),
    Refused(RefusedReason),
    /// A page; with `more`, ask again behind the last line.
    Processes {
        lines: Vec<ProcessLine>,
        more: bool,
    },
    /// A page; with `more`, ask again behind the last line.
    Resources {
        lines: Vec<ResourceLine>,
        more: bool,
    },
}

/// Why the master refuses: what a caller can act on as data, all else as text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum RefusedReason {
    Resource(ResourceError),
    NoSuchProcess(ProcessId),
    ShutDown,
    Other(String),
}

impl RefusedReason {
    /// The error that the caller gets; `doing` says what it asked for, with the object.
    pub(crate) fn into_error(self, doing: impl Into<String>) -> Error {
        match self {
            RefusedReason::Resource(error) => error.into(),
            RefusedReason::ShutDown => Error::ShutDown,
            RefusedReason::NoSuchProcess(process) => Error::Refused {
                doing: doing.into(),
                reason: format!("there is no {process}, or it has ended"),
            },
            RefusedReason::Other(reason) => Error::Refused {
                doing: doing.into(),
                reason,
            },
        }
    }
}

impl From<ResourceError> for RefusedReason {
    fn from(error: ResourceError) -> RefusedReason {
        RefusedReason::Resource(error)
    }
}

impl From<Error> for RefusedReason {
    fn from(error: Error) -> RefusedReason {
        match error {
            Error::NoResource {
                id,
                expected,
                found,
            } => RefusedReason::Resource(ResourceError::NoResource {
                id,
                expected,
                found,
            }),
            Error::NotAUser { id } => RefusedReason::Resource(ResourceError::NotAUser { id }),
            Error::AlreadyManaged { id, wanted, found } => {
                RefusedReason::Resource(ResourceError::AlreadyManaged { id, wanted, found })
            }
            Error::ShutDown => RefusedReason::ShutDown,
            other => RefusedReason::Other(with_causes(&other)),
        }
    }
}

/// What an error says, and what its causes say: they cannot travel themselves.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some messages have that of their cause in them.
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

/// One line of a listing of processes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ProcessLine {
    pub(crate) id: ProcessId,
    pub(crate) state: ProcessState,
    /// The Unix pid, while a worker runs it.
    pub(crate) pid: Option<i32>,
    /// Who started it; `None` is the master.
    pub(crate) started_by: Option<ProcessId>,
    /// What it runs.
    pub(crate) definition: String,
}

/// How far a process has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum ProcessState {
    Queued,
    Running,
    Done,
    Failed,
}

impl fmt::Display for ProcessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ProcessState::Queued => "queued",
            ProcessState::Running => "running",
            ProcessState::Done => "done",
            ProcessState::Failed => "failed",
        })
    }
}

/// Which of the two messages a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Request = 1,
    Reply = 2,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Request => "request",
            Kind::Reply => "reply",
        })
    }
}

/// What came over a connection was not what the protocol says. The connection is of no use any more.
#[non_exhaustive]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WireError {
    /// The bytes are not a frame; another protocol is spoken.
    ForeignProtocol {
        /// The first bytes that came, 16 at most.
        first_bytes: Vec<u8>,
    },
    /// The peer speaks another version.
    OtherVersion {
        /// The peer's version.
        found: u16,
        /// This program's version.
        expected: u16,
    },
    /// The frame carries a kind of message that was not expected or does not exist.
    WrongKind {
        /// The number in the frame.
        found: u16,
    },
    /// The frame announces, or would need, a longer body than is allowed.
    TooLong {
        /// The length of the body in bytes.
        len_bytes: u64,
        /// The most bytes that a body may have.
        limit_bytes: usize,
    },
    /// The body is not a message.
    BadBody {
        /// The type of the message.
        type_name: &'static str,
        /// What the codec said.
        reason: String,
    },
    /// The stream ended within a frame.
    Truncated {
        /// The bytes that came after the last whole frame.
        have_bytes: usize,
        /// The bytes that the frame has, as far as known.
        want_bytes: usize,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireError::ForeignProtocol { first_bytes } => {
                f.write_str("the peer does not speak netmcore's protocol: its first bytes are")?;
                for byte in first_bytes {
                    write!(f, " {byte:02x}")?;
                }
                if sun_rpc_refusal(first_bytes).is_some() {
                    f.write_str(
                        ", a Sun RPC call, which Netplex's admin tools send; use the `netmcore` command instead",
                    )?;
                }
                Ok(())
            }
            WireError::OtherVersion { found, expected } => write!(
                f,
                "the peer speaks version {found} of the protocol, and this program version {expected}; \
                 use programs with the same version of netmcore"
            ),
            WireError::WrongKind { found } => {
                let name = match found {
                    1 => "a request",
                    2 => "a reply",
                    _ => "unknown",
                };
                write!(
                    f,
                    "the peer sent a frame of the wrong kind {found} ({name})"
                )
            }
            WireError::TooLong {
                len_bytes,
                limit_bytes,
            } => write!(
                f,
                "a message has {len_bytes} bytes, and {limit_bytes} are the limit; send large data as an argument or \
                 through shared memory"
            ),
            WireError::BadBody { type_name, reason } => {
                write!(
                    f,
                    "the peer sent a frame whose body is not a {type_name}: {reason}"
                )
            }
            WireError::Truncated {
                have_bytes,
                want_bytes,
            } => write!(
                f,
                "the connection ended in the middle of a message, after {have_bytes} of {want_bytes} bytes"
            ),
        }
    }
}

impl std::error::Error for WireError {}

/// A message that a frame can carry.
pub(crate) trait Message: Serialize + serde::de::DeserializeOwned {
    const KIND: Kind;
    const NAME: &'static str;
}

impl Message for Request {
    const KIND: Kind = Kind::Request;
    const NAME: &'static str = "request";
}

impl Message for Reply {
    const KIND: Kind = Kind::Reply;
    const NAME: &'static str = "reply";
}

/// Makes the whole frame for a message.
///
/// # Errors
///
/// `TooLong`, and `BadBody` for a message that cannot be encoded (none of ours).
pub(crate) fn frame<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    let body = encode_to_vec(Codec::Bincode, message).map_err(|error| WireError::BadBody {
        type_name: M::NAME,
        reason: error.reason,
    })?;
    let len = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= BODY_LIMIT_BYTES)
        .ok_or(WireError::TooLong {
            len_bytes: body.len() as u64,
            limit_bytes: BODY_LIMIT_BYTES,
        })?;
    let mut frame = Vec::with_capacity(HEADER_LEN_BYTES + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&(M::KIND as u16).to_le_bytes());
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// A whole frame that arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Frame {
    kind: Kind,
    body: Vec<u8>,
}

impl Frame {
    /// Decodes the message in it.
    pub(crate) fn message<M: Message>(&self) -> Result<M, WireError> {
        if self.kind != M::KIND {
            return Err(WireError::WrongKind {
                found: self.kind as u16,
            });
        }
        decode(Codec::Bincode, &self.body).map_err(|error| WireError::BadBody {
            type_name: M::NAME,
            reason: error.reason,
        })
    }
}

/// Puts frames together from reads of any size.
#[derive(Default)]
pub(crate) struct FrameReader {
    buffer: Vec<u8>,
    /// The bytes of `buffer` that have been given out as frames.
    taken_bytes: usize,
    failed: Option<WireError>,
}

impl FrameReader {
    /// Takes what was read, and returns the first whole frame. While there is one, ask
    /// [`next_frame`](Self::next_frame) for more.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Option<Frame>, WireError> {
        if self.failed.is_none() {
            self.buffer.drain(..self.taken_bytes);
            self.taken_bytes = 0;
            self.buffer.extend_from_slice(bytes);
        }
        self.next_frame()
    }

    /// Returns the next whole frame among the bytes that are there.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match parse(&self.buffer[self.taken_bytes..]) {
            Ok(Parsed::Frame(frame)) => {
                self.taken_bytes += HEADER_LEN_BYTES + frame.body.len();
                Ok(Some(frame))
            }
            Ok(Parsed::Incomplete { .. }) => Ok(None),
            Err(error) => {
                self.failed = Some(error.clone());
                self.buffer = Vec::new();
                self.taken_bytes = 0;
                Err(error)
            }
        }
    }

    /// Says whether the stream may end here.
    pub(crate) fn finish(&self) -> Result<(), WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let rest = &self.buffer[self.taken_bytes..];
        match parse(rest)? {
            Parsed::Incomplete { want_bytes } if !rest.is_empty() => Err(WireError::Truncated {
                have_bytes: rest.len(),
                want_bytes,
            }),
            Parsed::Incomplete { .. } | Parsed::Frame(_) => Ok(()),
        }
    }
}

enum Parsed {
    Frame(Frame),
    Incomplete { want_bytes: usize },
}

fn parse(bytes: &[u8]) -> Result<Parsed, WireError> {
    let begun = bytes.len().min(MAGIC.len());
    if bytes[..begun] != MAGIC[..begun] {
        if bytes.len() < SUN_RPC_CALL_LEN_BYTES && begins_like_sun_rpc(bytes) {
            // Enough is wanted for an answer in its own protocol.
            return Ok(Parsed::Incomplete {
                want_bytes: SUN_RPC_CALL_LEN_BYTES,
            });
        }
        let first_bytes = &bytes[..bytes.len().min(SUN_RPC_CALL_LEN_BYTES)];
        return Err(WireError::ForeignProtocol {
            first_bytes: first_bytes.to_vec(),
        });
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN_BYTES>() else {
        return Ok(Parsed::Incomplete {
            want_bytes: HEADER_LEN_BYTES,
        });
    };
    let &[_, _, _, _, v0, v1, k0, k1, l0, l1, l2, l3] = header;
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(WireError::OtherVersion {
            found: version,
            expected: VERSION,
        });
    }
    let kind = match u16::from_le_bytes([k0, k1]) {
        1 => Kind::Request,
        2 => Kind::Reply,
        found => return Err(WireError::WrongKind { found }),
    };
    let len = u32::from_le_bytes([l0, l1, l2, l3]);
    let len_bytes = len as usize;
    if len_bytes > BODY_LIMIT_BYTES {
        return Err(WireError::TooLong {
            len_bytes: u64::from(len),
            limit_bytes: BODY_LIMIT_BYTES,
        });
    }
    match rest.get(..len_bytes) {
        Some(body) => Ok(Parsed::Frame(Frame {
            kind,
            body: body.to_vec(),
        })),
        None => Ok(Parsed::Incomplete {
            want_bytes: HEADER_LEN_BYTES + len_bytes,
        }),
    }
}

/// Record mark, transaction id, message type, RPC version: RFC 5531, sections 9 and 11.
const SUN_RPC_CALL_LEN_BYTES: usize = 16;

/// Says whether these can be the first bytes of a Sun RPC call over a stream, as far as they go.
fn begins_like_sun_rpc(bytes: &[u8]) -> bool {
    let is_mark_of_last_fragment = bytes.first().is_none_or(|byte| byte & 0x80 != 0);
    let call_and_version = [0, 0, 0, 0, 0, 0, 0, 2];
    let rest = bytes.get(8..).unwrap_or_default();
    let len = rest.len().min(call_and_version.len());
    is_mark_of_last_fragment && rest[..len] == call_and_version[..len]
}

/// Returns the answer "no such program" to a Sun RPC call that begins with these bytes: what Netplex's admin tools get
/// instead of a closed connection.
pub(crate) fn sun_rpc_refusal(first_bytes: &[u8]) -> Option<[u8; 28]> {
    let call = first_bytes.first_chunk::<SUN_RPC_CALL_LEN_BYTES>()?;
    if !begins_like_sun_rpc(call) {
        return None;
    }
    let mut reply = [0; 28];
    reply[..4].copy_from_slice(&(0x8000_0000_u32 | 24).to_be_bytes());
    reply[4..8].copy_from_slice(&call[4..8]);
    reply[8..12].copy_from_slice(&1_u32.to_be_bytes()); // a reply; accepted, without verifier: zeros
    reply[24..28].copy_from_slice(&1_u32.to_be_bytes()); // program unavailable
    Some(reply)
}

#[cfg(test)]
mod tests {
    use netmcore_sys::ObjectName;
    use proptest::prelude::*;

    use super::*;
    use crate::resource::User;

    /// A call of `netplex-admin` (program 0x2000_0003), as it stands on the wire.
    const SUN_RPC_CALL: [u8; 44] = [
        0x80, 0, 0, 40, 0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0, 0, 0, 0, 2, 0x20, 0, 0, 3, 0, 0, 0, 2,
        0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];

    fn read_all(pieces: impl IntoIterator<Item = Vec<u8>>) -> (Vec<Frame>, Result<(), WireError>) {
        let mut reader = FrameReader::default();
        let mut frames = Vec::new();
        for piece in pieces {
            let mut next = reader.push(&piece);
            loop {
                match next {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Err(error)),
                }
                next = reader.next_frame();
            }
        }
        (frames, reader.finish())
    }

    fn header(version: u16, kind: u16, len: u32) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes
    }

    fn error_of(bytes: &[u8]) -> WireError {
        read_all([bytes.to_vec()]).1.unwrap_err()
    }

    #[test]
    fn format_is_as_documented() {
        let bytes = frame(&Request::Shutdown).unwrap();
        assert_eq!(bytes, *b"nmcw\x03\0\x01\0\x04\0\0\0\x0d\0\0\0");
        let bytes = frame(&Reply::Id(ResourceId::from_raw(7))).unwrap();
        assert_eq!(
            bytes,
            *b"nmcw\x03\0\x02\0\x0c\0\0\0\x01\0\0\0\x07\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn errors_say_what_came_and_what_to_do() {
        for (error, message) in [
            (
                error_of(b"GET / HTTP/1.1\r\n\r\n"),
                "the peer does not speak netmcore's protocol: its first bytes are 47 45 54 20 2f 20 48 54 54 50 2f \
                 31 2e 31 0d 0a",
            ),
            (
                error_of(&SUN_RPC_CALL),
                "the peer does not speak netmcore's protocol: its first bytes are 80 00 00 28 de ad be ef 00 00 00 \
                 00 00 00 00 02, a Sun RPC call, which Netplex's admin tools send; use the `netmcore` command instead",
            ),
            (
                error_of(&header(4, 1, 0)),
                "the peer speaks version 4 of the protocol, and this program version 3; use programs with the same \
                 version of netmcore",
            ),
            (
                error_of(&header(VERSION, 9, 0)),
                "the peer sent a frame of the wrong kind 9 (unknown)",
            ),
            (
                error_of(&header(VERSION, 1, (1 << 20) + 1)),
                "a message has 1048577 bytes, and 1048576 are the limit; send large data as an argument or through \
                 shared memory",
            ),
            (
                error_of(&header(VERSION, 1, 4)),
                "the connection ended in the middle of a message, after 12 of 16 bytes",
            ),
            (
                error_of(b"nm"),
                "the connection ended in the middle of a message, after 2 of 12 bytes",
            ),
            (
                Frame {
                    kind: Kind::Reply,
                    body: vec![],
                }
                .message::<Request>()
                .unwrap_err(),
                "the peer sent a frame of the wrong kind 2 (a reply)",
            ),
            (
                Frame {
                    kind: Kind::Request,
                    body: vec![99, 0, 0, 0],
                }
                .message::<Request>()
                .unwrap_err(),
                "the peer sent a frame whose body is not a request: invalid value: integer `99`, expected variant \
                 index 0 <= i < 16",
            ),
        ] {
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn length_is_checked_before_memory_is_taken() {
        let mut reader = FrameReader::default();
        let longest = BODY_LIMIT_BYTES as u32;
        assert_eq!(reader.push(&header(VERSION, 1, longest)), Ok(None));
        assert!(reader.buffer.capacity() < 1024);
        let mut reader = FrameReader::default();
        assert!(reader.push(&header(VERSION, 1, u32::MAX)).is_err());
        assert_eq!(reader.buffer.capacity(), 0);
        let path = format!("/{}", "x".repeat(BODY_LIMIT_BYTES));
        let too_long = Request::Manage(ResourceRepr::File(path.into()));
        assert!(matches!(frame(&too_long), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn after_an_error_nothing_is_read() {
        let mut reader = FrameReader::default();
        let error = reader.push(b"x").unwrap_err();
        let good = frame(&Request::Shutdown).unwrap();
        assert_eq!(reader.push(&good), Err(error.clone()));
        assert_eq!(reader.finish(), Err(error));
    }

    #[test]
    fn ancestors_call_is_refused_in_its_own_protocol() {
        // However it is cut, enough of it is kept for the answer.
        for cut in 0..SUN_RPC_CALL.len() {
            let pieces = [&SUN_RPC_CALL[..cut], &SUN_RPC_CALL[cut..]].map(<[u8]>::to_vec);
            let (frames, end) = read_all(pieces);
            assert_eq!(frames, []);
            let Err(WireError::ForeignProtocol { first_bytes }) = end else {
                panic!("{end:?}");
            };
            let refusal = sun_rpc_refusal(&first_bytes).unwrap();
            let words: Vec<u32> = refusal
                .chunks(4)
                .map(|word| u32::from_be_bytes(word.try_into().unwrap()))
                .collect();
            // Mark with length; same transaction, reply, accepted, no verifier, program unavailable.
            assert_eq!(words, [0x8000_0018, 0xdead_beef, 1, 0, 0, 0, 1]);
        }
        assert_eq!(sun_rpc_refusal(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(sun_rpc_refusal(&SUN_RPC_CALL[..15]), None);
    }

    #[test]
    fn refusals_arrive_as_the_errors_they_were() {
        let id = ResourceId::from_raw(4);
        for (error, message) in [
            (
                Error::NoResource {
                    id,
                    expected: Some(ResourceType::File),
                    found: Some(ResourceType::PosixSem),
                },
                "the call needs a temporary file, and Resource 4 is a named semaphore",
            ),
            (
                Error::NotAUser { id },
                "this process does not use Resource 4: it never got it, or has released it as often as it got it",
            ),
            (
                Error::ShutDown,
                "the master is shutting down: nothing new can be started",
            ),
            (
                Error::NotInMaster { call: "join" },
                "release of Resource 4: the master refused: `join` is refused in the master, which must never wait \
                 or compute: call it in a worker",
            ),
        ] {
            let sent = RefusedReason::from(error);
            let bytes = frame(&Reply::Refused(sent)).unwrap();
            let (frames, end) = read_all([bytes]);
            assert_eq!(end, Ok(()));
            let Reply::Refused(reason) = frames[0].message().unwrap() else {
                panic!("{frames:?}");
            };
            let error = reason.into_error(format!("release of {id}"));
            assert_eq!(error.to_string(), message);
        }
        let reason = RefusedReason::NoSuchProcess(ProcessId::from_raw(9));
        assert_eq!(
            reason.into_error("kill of Process 9").to_string(),
            "kill of Process 9: the master refused: there is no Process 9, or it has ended"
        );
    }

    fn process() -> impl Strategy<Value = ProcessId> {
        any::<u64>().prop_map(ProcessId::from_raw)
    }

    fn resource() -> impl Strategy<Value = ResourceId> {
        any::<u64>().prop_map(ResourceId::from_raw)
    }

    fn leg() -> impl Strategy<Value = Leg> {
        prop_oneof![Just(Leg::Argument), Just(Leg::Result)]
    }

    fn repr() -> impl Strategy<Value = ResourceRepr> {
        let name = |prefix: &'static str| {
            "[a-z]{1,20}".prop_map(move |text| ObjectName::new(format!("/{prefix}{text}")).unwrap())
        };
        prop_oneof![
            "/[a-z]{1,8}/[a-z]{1,8}".prop_map(|path| ResourceRepr::File(path.into())),
            any::<u32>().prop_map(ResourceRepr::ForkPoint),
            name("m").prop_map(ResourceRepr::PosixSem),
            (name("s"), name("c"))
                .prop_map(|(name, prefix)| ResourceRepr::PosixShmSc { name, prefix }),
            (name("r"), any::<[u64; 3]>()).prop_map(|(name, [at, len_bytes, max_len_bytes])| {
                ResourceRepr::PosixShmPreallocated {
                    name,
                    at,
                    len_bytes,
                    max_len_bytes,
                }
            }),
        ]
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            prop::option::of(process()).prop_map(|process| Request::Hello { process }),
            repr().prop_map(Request::Manage),
            resource().prop_map(|id| Request::Map { id }),
            resource().prop_map(|id| Request::Get {
                id,
                expected: Some(ResourceType::File)
            }),
            any::<bool>().prop_map(|with_mappings| Request::ReleaseAll { with_mappings }),
            (process(), leg(), prop::collection::vec(resource(), 0..20))
                .prop_map(|(process, leg, ids)| Request::Send { process, leg, ids }),
            (process(), any::<i32>())
                .prop_map(|(process, signal)| Request::Kill { process, signal }),
            resource().prop_map(|id| Request::Resources { after: Some(id) }),
        ]
    }

    fn reply() -> impl Strategy<Value = Reply> {
        let line = (resource(), repr(), process()).prop_map(|(id, repr, process)| ResourceLine {
            id,
            repr,
            user_count: 2,
            users: vec![(User::Master, 1), (User::Process(process), 3)],
        });
        prop_oneof![
            Just(Reply::Done),
            repr().prop_map(Reply::Repr),
            (prop::collection::vec(line, 0..10), any::<bool>())
                .prop_map(|(lines, more)| Reply::Resources { lines, more }),
            ".{0,50}".prop_map(|text| Reply::Refused(RefusedReason::Other(text))),
        ]
    }

    #[derive(Clone, PartialEq, Debug)]
    enum Either {
        Request(Request),
        Reply(Reply),
    }

    fn stream() -> impl Strategy<Value = (Vec<Either>, Vec<u8>)> {
        let message = prop_oneof![
            request().prop_map(Either::Request),
            reply().prop_map(Either::Reply)
        ];
        prop::collection::vec(message, 0..6).prop_map(|messages| {
            let mut bytes = Vec::new();
            for message in &messages {
                bytes.extend(match message {
                    Either::Request(request) => frame(request).unwrap(),
                    Either::Reply(reply) => frame(reply).unwrap(),
                });
            }
            (messages, bytes)
        })
    }

    fn decoded(frame: &Frame) -> Result<Either, WireError> {
        match frame.kind {
            Kind::Request => frame.message().map(Either::Request),
            Kind::Reply => frame.message().map(Either::Reply),
        }
    }

    /// Cuts at the given places, as far as they lie inside.
    fn cut(bytes: &[u8], mut places: Vec<prop::sample::Index>) -> Vec<Vec<u8>> {
        let mut at: Vec<usize> = places.drain(..).map(|i| i.index(bytes.len() + 1)).collect();
        at.push(0);
        at.push(bytes.len());
        at.sort_unstable();
        at.windows(2).map(|w| bytes[w[0]..w[1]].to_vec()).collect()
    }

    fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
        prop::collection::vec(any::<prop::sample::Index>(), 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_split_decodes_the_same((messages, bytes) in stream(), cuts in cuts()) {
            let (frames, end) = read_all(cut(&bytes, cuts));
            prop_assert_eq!(end, Ok(()));
            let read: Result<Vec<_>, _> = frames.iter().map(decoded).collect();
            prop_assert_eq!(read, Ok(messages));
        }

        #[test]
        fn single_bytes_decode_the_same((messages, bytes) in stream()) {
            let (frames, end) = read_all(bytes.iter().map(|byte| vec![*byte]));
            prop_assert_eq!(end, Ok(()));
            let read: Result<Vec<_>, _> = frames.iter().map(decoded).collect();
            prop_assert_eq!(read, Ok(messages));
        }

        #[test]
        fn truncated_stream_is_noticed((messages, bytes) in stream(), at in any::<prop::sample::Index>()) {
            let at = at.index(bytes.len() + 1);
            let (frames, end) = read_all([bytes[..at].to_vec()]);
            let whole: usize = frames.iter().map(|frame| HEADER_LEN_BYTES + frame.body.len()).sum();
            prop_assert_eq!(end.is_ok(), whole == at);
            let read: Result<Vec<_>, _> = frames.iter().map(decoded).collect();
            prop_assert_eq!(read, Ok(messages[..frames.len()].to_vec()));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), cuts in cuts()) {
            let whole = read_all([bytes.clone()]);
            let in_pieces = read_all(cut(&bytes, cuts));
            prop_assert_eq!(whole.0, in_pieces.0);
            prop_assert_eq!(whole.1.is_ok(), in_pieces.1.is_ok());
        }

        #[test]
        fn any_body_is_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..200), tag in 0..20_u32) {
            for kind in [Kind::Request, Kind::Reply] {
                let mut body = body.clone();
                let _ = decoded(&Frame { kind, body: body.clone() });
                body.splice(0..body.len().min(4), tag.to_le_bytes());
                let _ = decoded(&Frame { kind, body });
            }
        }

        #[test]
        fn damaged_stream_is_read_or_refused(
            (_, mut bytes) in stream(),
            at in any::<prop::sample::Index>(),
            new in any::<u8>(),
            cuts in cuts(),
        ) {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = new;
            }
            let whole = read_all([bytes.clone()]);
            let in_pieces = read_all(cut(&bytes, cuts));
            for frame in &whole.0 {
                let _ = decoded(frame);
            }
            prop_assert_eq!(whole.0, in_pieces.0);
            prop_assert_eq!(whole.1.is_ok(), in_pieces.1.is_ok());
        }
    }
}

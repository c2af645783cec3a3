//! The text of a record: its grammar, its escapes, and what a torn or damaged line looks like.
//!
//! **Format.** One operation a line, as the ancestor (OCamlnet's `Netsys_pmanage`) writes it, byte for byte:
//!
//! ```text
//! line   = op SP kind SP quoted LF          op = R | U      kind = FILE | POSIX_SHM | POSIX_SEM | SEM_CONT
//! quoted = an OCaml string literal: \" \\ \n \t \r \b; bytes 0x20-0x7e as they are;
//!          every other byte as three decimal digits, \195
//! ```
//!
//! `R` adds the object to a set, `U` takes it out; neither counts. The reader also takes: a missing last
//! LF, CR LF, several blanks or tabs between fields and none behind the operation, blanks at the end of a line, NUL bytes at the end of
//! the text, raw bytes inside the quotes, `\'` and `\xHH`. A raw LF always ends the line: no writer puts one into a
//! name, and a lost quote must not swallow the lines behind it.
//!
//! **Invariants.**
//! 1. [`parse`] never fails: a line that cannot be read is [`Damaged`] and stops nothing else.
//! 2. What [`parse`] lists as objects passes [`KernelObject::check`].
//! 3. A text cut at any byte gives the objects of its whole lines, or one line more.
//!
//! **If a process dies here.** A writer killed inside its append leaves a last line without LF. If it
//! is complete but for the LF, it counts. If not, it is [`Tail::Torn`]: its operation never happened, since the
//! writer creates only after the append returned, and unlinks before it.
//!
//! **Not here.** Reading and writing files: [`crate::log`].

use std::collections::BTreeSet;
use std::fmt;

use netmcore_sys::record::ObjectKind;

use crate::object::{InvalidName, KernelObject};

/// What a line does to the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `R`: the object may exist from now on.
    Register,
    /// `U`: the object does not exist any more.
    Unregister,
}

/// Appends the line for `operation` on `object` to `text`.
///
/// ```
/// use netmcore_pmanage::record::{self, Operation};
/// use netmcore_pmanage::KernelObject;
///
/// let mut text = Vec::new();
/// record::encode(Operation::Register, &KernelObject::File("/tmp/é".into()), &mut text);
/// assert_eq!(text, b"R FILE \"/tmp/\\195\\169\"\n");
/// ```
pub fn encode(operation: Operation, object: &KernelObject, text: &mut Vec<u8>) {
    text.push(match operation {
        Operation::Register => b'R',
        Operation::Unregister => b'U',
    });
    text.push(b' ');
    text.extend_from_slice(keyword(object.kind()).as_bytes());
    text.extend_from_slice(b" \"");
    for &byte in object.name() {
        match byte {
            b'"' => text.extend_from_slice(b"\\\""),
            b'\\' => text.extend_from_slice(b"\\\\"),
            b'\n' => text.extend_from_slice(b"\\n"),
            b'\t' => text.extend_from_slice(b"\\t"),
            b'\r' => text.extend_from_slice(b"\\r"),
            0x08 => text.extend_from_slice(b"\\b"),
            b' '..=b'~' => text.push(byte),
            _ => text.extend_from_slice(format!("\\{byte:03}").as_bytes()),
        }
    }
    text.extend_from_slice(b"\"\n");
}

fn keyword(kind: ObjectKind) -> &'static str {
    match kind {
        ObjectKind::File => "FILE",
        ObjectKind::PosixShm => "POSIX_SHM",
        ObjectKind::PosixSem => "POSIX_SEM",
        ObjectKind::SemContainer => "SEM_CONT",
    }
}

/// The shortest text that records exactly `objects`.
pub fn compact(objects: &BTreeSet<KernelObject>) -> Vec<u8> {
    let mut text = Vec::new();
    for object in objects {
        encode(Operation::Register, object, &mut text);
    }
    text
}

/// What a record says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The objects that are registered.
    pub objects: BTreeSet<KernelObject>,
    /// The lines that cannot be read, in their order; a torn last line is not among them.
    pub damaged: Vec<Damaged>,
    /// How the text ends.
    pub tail: Tail,
}

/// A line of a record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Its number; the first line is 1.
    pub line: usize,
    /// Its bytes, without the LF.
    pub bytes: Vec<u8>,
    /// What is wrong with it.
    pub reason: Damage,
}

/// How a record's text ends, and so what has to be done before something is appended to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tail {
    /// With LF, or the text is empty.
    #[default]
    Whole,
    /// With NUL bytes behind the last LF: they are to be cut off.
    Padded {
        /// Bytes to keep.
        keep_bytes: usize,
    },
    /// With a complete line that only lacks its LF (and perhaps NUL bytes, which are to be cut off).
    Unended {
        /// Bytes to keep.
        keep_bytes: usize,
    },
    /// With the beginning of a line, which is to be cut off.
    Torn {
        /// Bytes to keep.
        keep_bytes: usize,
        /// The line, and where it stops making sense.
        line: Damaged,
    },
}

/// Why a line cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// It begins neither with `R` nor with `U`.
    UnknownOperation,
    /// The second field is none of the four kinds.
    UnknownKind,
    /// The third field does not begin with a quote.
    NoQuote,
    /// There is no quote at the end of the name.
    NoEndQuote,
    /// A backslash in the name is followed by something that is no escape.
    BadEscape,
    /// Something follows the name.
    TextBehindName,
    /// The name is none that an object of this kind can have.
    Name(Box<InvalidName>),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Damage::UnknownOperation => "it begins neither with R nor with U",
            Damage::UnknownKind => {
                "its second field is none of FILE, POSIX_SHM, POSIX_SEM, SEM_CONT"
            }
            Damage::NoQuote => "its third field does not begin with a quote",
            Damage::NoEndQuote => "its name has no closing quote",
            Damage::BadEscape => "its name contains an unknown escape",
            Damage::TextBehindName => "something follows its name",
            Damage::Name(invalid) => return write!(f, "{invalid}"),
        })
    }
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

/// Reads a whole record.
///
/// ```
/// use netmcore_pmanage::record::{self, Tail};
///
/// let contents = record::parse(b"R POSIX_SHM \"/a\"\nhello\nR POSIX_SHM \"/b\"\nU POSIX_SHM \"/a\"\nR FI");
/// assert_eq!(contents.objects.len(), 1);
/// assert_eq!(contents.damaged[0].line, 2);
/// assert!(matches!(contents.tail, Tail::Torn { keep_bytes: 57, .. }));
/// ```
pub fn parse(text: &[u8]) -> Contents {
    let mut contents = Contents::default();
    let unpadded = text.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
    let is_padded = unpadded < text.len();
    let text = &text[..unpadded];

    let mut start = 0;
    let mut number = 0;
    while let Some(len) = text[start..].iter().position(|&b| b == b'\n') {
        number += 1;
        contents.take(number, &text[start..start + len]);
        start += len + 1;
    }
    let last = &text[start..];
    contents.tail = if last.is_empty() {
        if is_padded {
            Tail::Padded { keep_bytes: start }
        } else {
            Tail::Whole
        }
    } else {
        match parse_line(last) {
            Err(reason) if !matches!(reason, Damage::Name(_)) => Tail::Torn {
                keep_bytes: start,
                line: Damaged {
                    line: number + 1,
                    bytes: last.to_vec(),
                    reason,
                },
            },
            _ => {
                contents.take(number + 1, last);
                Tail::Unended {
                    keep_bytes: unpadded,
                }
            }
        }
    };
    contents
}

impl Contents {
    fn take(&mut self, number: usize, line: &[u8]) {
        match parse_line(line) {
            Ok(None) => {}
            Ok(Some(line)) => line.apply(&mut self.objects),
            Err(reason) => self.damaged.push(Damaged {
                line: number,
                bytes: line.to_vec(),
                reason,
            }),
        }
    }
}

struct Line {
    operation: Operation,
    object: KernelObject,
}

impl Line {
    fn apply(self, objects: &mut BTreeSet<KernelObject>) {
        match self.operation {
            Operation::Register => objects.insert(self.object),
            Operation::Unregister => objects.remove(&self.object),
        };
    }
}

/// Reads one line, given without its LF; `None` is a line of blanks.
fn parse_line(line: &[u8]) -> Result<Option<Line>, Damage> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (operation, rest) = match skip_blanks(line) {
        [] => return Ok(None),
        [b'R', rest @ ..] => (Operation::Register, rest),
        [b'U', rest @ ..] => (Operation::Unregister, rest),
        _ => return Err(Damage::UnknownOperation),
    };
    let rest = skip_blanks(rest);
    let end = rest.iter().position(|&b| is_blank(b)).unwrap_or(rest.len());
    let kind = match &rest[..end] {
        b"FILE" => ObjectKind::File,
        b"POSIX_SHM" => ObjectKind::PosixShm,
        b"POSIX_SEM" => ObjectKind::PosixSem,
        b"SEM_CONT" => ObjectKind::SemContainer,
        _ => return Err(Damage::UnknownKind),
    };
    let [b'"', quoted @ ..] = skip_blanks(&rest[end..]) else {
        return Err(Damage::NoQuote);
    };
    let (name, rest) = unquote(quoted)?;
    if !skip_blanks(rest).is_empty() {
        return Err(Damage::TextBehindName);
    }
    let object = KernelObject::new(kind, &name).map_err(|e| Damage::Name(Box::new(e)))?;
    Ok(Some(Line { operation, object }))
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn skip_blanks(mut bytes: &[u8]) -> &[u8] {
    while let [first, rest @ ..] = bytes
        && is_blank(*first)
    {
        bytes = rest;
    }
    bytes
}

/// Reads a name up to its closing quote; gives the name and what follows the quote.
fn unquote(mut quoted: &[u8]) -> Result<(Vec<u8>, &[u8]), Damage> {
    let mut name = Vec::with_capacity(quoted.len());
    loop {
        let (byte, rest) = match quoted {
            [] => return Err(Damage::NoEndQuote),
            [b'"', rest @ ..] => return Ok((name, rest)),
            [b'\\', escape @ ..] => unescape(escape)?,
            [raw, rest @ ..] => (*raw, rest),
        };
        name.push(byte);
        quoted = rest;
    }
}

/// Reads what follows a backslash; gives the byte and what follows the escape.
fn unescape(escape: &[u8]) -> Result<(u8, &[u8]), Damage> {
    let (byte, rest) = match escape {
        [] => return Err(Damage::NoEndQuote),
        [b'n', rest @ ..] => (b'\n', rest),
        [b't', rest @ ..] => (b'\t', rest),
        [b'r', rest @ ..] => (b'\r', rest),
        [b'b', rest @ ..] => (0x08, rest),
        [byte @ (b'"' | b'\\' | b'\''), rest @ ..] => (*byte, rest),
        [b'x', high, low, rest @ ..] => {
            let digits = [hex(*high)?, hex(*low)?];
            (digits[0] << 4 | digits[1], rest)
        }
        [a, b, c, rest @ ..] if [a, b, c].iter().all(|digit| digit.is_ascii_digit()) => {
            let value = [a, b, c]
                .iter()
                .fold(0, |value, digit| value * 10 + u16::from(**digit - b'0'));
            (u8::try_from(value).map_err(|_| Damage::BadEscape)?, rest)
        }
        _ => return Err(Damage::BadEscape),
    };
    Ok((byte, rest))
}

fn hex(digit: u8) -> Result<u8, Damage> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(Damage::BadEscape),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &[u8]) -> KernelObject {
        KernelObject::new(ObjectKind::File, name).unwrap()
    }

    fn reads_as(line: &[u8], name: &[u8]) {
        let contents = parse(line);
        assert_eq!(contents.damaged, [], "{}", line.escape_ascii());
        assert_eq!(
            contents.objects,
            BTreeSet::from([file(name)]),
            "{}",
            line.escape_ascii()
        );
    }

    fn damage(line: &[u8]) -> Damage {
        let text = [line, b"\nR FILE \"/next\"\n"].concat();
        let mut contents = parse(&text);
        assert_eq!(contents.objects, BTreeSet::from([file(b"/next")]));
        assert_eq!(contents.damaged.len(), 1, "{}", line.escape_ascii());
        assert_eq!(contents.damaged[0].line, 1);
        assert_eq!(contents.damaged[0].bytes, line);
        contents.damaged.remove(0).reason
    }

    #[test]
    fn encode_writes_the_ancestors_bytes() {
        let cases: [(&[u8], &[u8]); 5] = [
            (b"/a", b"/a"),
            (b"/a b~'", b"/a b~'"),
            (b"/\"\\\n\t\r\x08", b"/\\\"\\\\\\n\\t\\r\\b"),
            (b"/\x01\x0b\x1f\x7f", b"/\\001\\011\\031\\127"),
            (b"/\xc3\xa9\xff", b"/\\195\\169\\255"),
        ];
        for (name, quoted) in cases {
            let mut text = Vec::new();
            encode(Operation::Unregister, &file(name), &mut text);
            assert_eq!(text, [b"U FILE \"", quoted, b"\"\n"].concat());
        }
    }

    #[test]
    fn kinds_have_the_ancestors_keywords() {
        use ObjectKind::{File, PosixSem, PosixShm, SemContainer};
        let mut text = Vec::new();
        for kind in [File, PosixShm, PosixSem, SemContainer] {
            encode(
                Operation::Register,
                &KernelObject::new(kind, b"/x").unwrap(),
                &mut text,
            );
        }
        assert_eq!(
            text,
            b"R FILE \"/x\"\nR POSIX_SHM \"/x\"\nR POSIX_SEM \"/x\"\nR SEM_CONT \"/x\"\n"
        );
        assert_eq!(parse(&text).objects.len(), 4);
    }

    #[test]
    fn reader_takes_what_the_ancestors_takes() {
        reads_as(b"R FILE \"/a\"\n", b"/a");
        reads_as(b"R FILE \"/a\"", b"/a");
        reads_as(b"R FILE \"/a\"\r\n", b"/a");
        reads_as(b"R FILE \"/a\"\r", b"/a");
        reads_as(b"R  FILE \t \"/a\"\n", b"/a");
        reads_as(b"R\tFILE\t\"/a\" \t\n", b"/a");
        reads_as(b"RFILE \"/a\"\n", b"/a");
        reads_as(b"R FILE \"/a\"\n\0\0\0", b"/a");
        reads_as(b"R FILE \"/a\"\0", b"/a");
        reads_as(b"\n  \n\r\nR FILE \"/a\"\n", b"/a");
        reads_as(b"R FILE \"/\xc3\xa9\x01\t\r'\"\n", b"/\xc3\xa9\x01\t\r'");
        reads_as(
            b"R FILE \"/\\x41\\xfF\\065\\'\\b\\n\\\\\\\"\"\n",
            b"/A\xffA'\x08\n\\\"",
        );
    }

    #[test]
    fn record_is_a_set_not_a_count() {
        let line = b"R FILE \"/a\"\n".as_slice();
        let gone = [line, line, line, b"U FILE \"/a\"\n"].concat();
        assert_eq!(parse(&gone).objects, BTreeSet::new());
        assert_eq!(parse(&[&gone, line].concat()).objects.len(), 1);
    }

    #[test]
    fn damaged_line_is_reported_and_stops_nothing() {
        assert_eq!(damage(b"X FILE \"/a\""), Damage::UnknownOperation);
        assert_eq!(damage(b"\0\0"), Damage::UnknownOperation);
        assert_eq!(damage(b"R FILES \"/a\""), Damage::UnknownKind);
        assert_eq!(damage(b"R FILE\"/a\""), Damage::UnknownKind);
        assert_eq!(damage(b"R"), Damage::UnknownKind);
        assert_eq!(damage(b"R FILE"), Damage::NoQuote);
        assert_eq!(damage(b"R FILE /a"), Damage::NoQuote);
        assert_eq!(damage(b"R FILE \"/a"), Damage::NoEndQuote);
        assert_eq!(damage(b"R FILE \"/a\\"), Damage::NoEndQuote);
        assert_eq!(damage(b"R FILE \"/a\\\""), Damage::NoEndQuote);
        assert_eq!(damage(b"R FILE \"/\\q\""), Damage::BadEscape);
        assert_eq!(damage(b"R FILE \"/\\1\""), Damage::BadEscape);
        assert_eq!(damage(b"R FILE \"/\\256\""), Damage::BadEscape);
        assert_eq!(damage(b"R FILE \"/\\999\""), Damage::BadEscape);
        assert_eq!(damage(b"R FILE \"/\\xg1\""), Damage::BadEscape);
        assert_eq!(damage(b"R FILE \"/a\" x"), Damage::TextBehindName);
        assert_eq!(damage(b"R FILE \"/aR FILE \"/b\""), Damage::TextBehindName);
        assert!(matches!(damage(b"R FILE \"a\""), Damage::Name(_)));
        assert!(matches!(damage(b"R POSIX_SHM \"/a/b\""), Damage::Name(_)));
        assert!(matches!(damage(b"R SEM_CONT \"\""), Damage::Name(_)));
        assert!(matches!(damage(b"R POSIX_SEM \"/\\000\""), Damage::Name(_)));
    }

    #[test]
    fn tail_says_what_to_cut() {
        assert_eq!(parse(b"").tail, Tail::Whole);
        assert_eq!(parse(b"\0\0").tail, Tail::Padded { keep_bytes: 0 });
        let line = b"R FILE \"/a\"\n";
        assert_eq!(parse(line).tail, Tail::Whole);
        assert_eq!(
            parse(&[line.as_slice(), b"\0"].concat()).tail,
            Tail::Padded { keep_bytes: 12 }
        );
        assert_eq!(parse(&line[..11]).tail, Tail::Unended { keep_bytes: 11 });
        assert_eq!(
            parse(&[&line[..11], b"\0"].concat()).tail,
            Tail::Unended { keep_bytes: 11 }
        );
        // A whole line with a name that cannot be is damage, not a torn line.
        let invalid = parse(b"R FILE \"a\"");
        assert_eq!(invalid.tail, Tail::Unended { keep_bytes: 10 });
        assert_eq!(invalid.damaged.len(), 1);
        let torn = parse(&[line.as_slice(), b"R FILE \"/b"].concat());
        let Tail::Torn { keep_bytes, line } = torn.tail else {
            panic!("{:?}", torn.tail)
        };
        assert_eq!((keep_bytes, line.line), (12, 2));
        assert_eq!(torn.damaged, []);
    }

    #[test]
    fn text_cut_at_any_byte_gives_its_whole_lines() {
        let names: [&[u8]; 4] = [b"/a", b"/b \"\\\n", b"/\xff", b"/d\r"];
        let mut text = Vec::new();
        let mut ends = Vec::new();
        for name in names {
            encode(Operation::Register, &file(name), &mut text);
            ends.push(text.len());
        }
        for cut in 0..=text.len() {
            let contents = parse(&text[..cut]);
            // A line counts from its closing quote on, one byte before its LF.
            let whole = ends.iter().filter(|&&end| cut + 1 >= end).count();
            assert_eq!(contents.objects.len(), whole, "cut at {cut}");
            assert_eq!(contents.damaged, [], "cut at {cut}");
        }
    }
}

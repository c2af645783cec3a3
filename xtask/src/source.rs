//! One Rust source file, split by a small lexer into what is code and what is comment.
//!
//! **Invariants**: `code` and `comments` have exactly the byte length and the line breaks of `text`, so an
//! offset or a line found in one is valid in the others. In `code`, comments and the insides of string and character
//! literals are blanks; in `comments`, everything but comments is.
//!
//! **Not here**: a parser. The checks that use this look at words and their neighbours, nothing more.

use std::path::{Path, PathBuf};

/// A source file and its two views.
#[derive(Debug)]
pub struct Source {
    /// Relative to the workspace's root.
    pub path: PathBuf,
    /// The file as it is.
    pub text: String,
    /// `text` with comments and the insides of literals blanked.
    pub code: String,
    /// `text` with everything but comments blanked.
    pub comments: String,
}

impl Source {
    /// Splits `text`.
    pub fn new(path: impl Into<PathBuf>, text: impl Into<String>) -> Self {
        let text = text.into();
        let (code, comments) = split(&text);
        Source {
            path: path.into(),
            text,
            code,
            comments,
        }
    }

    /// The line, counted from 1, that `offset` lies in.
    pub fn line(&self, offset: usize) -> usize {
        1 + self.text.as_bytes()[..offset]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
    }

    /// Whether a comment with `marker` stands on the line of `offset` or directly above the statement around it.
    ///
    /// Going up, the walk ends at a blank line or at a line whose code ends a statement or opens a block.
    pub fn comment_above(&self, offset: usize, marker: &str) -> bool {
        let code: Vec<&str> = self.code.lines().collect();
        let comments: Vec<&str> = self.comments.lines().collect();
        let mut line = self.line(offset) - 1;
        if comments[line].contains(marker) {
            return true;
        }
        while line > 0 {
            line -= 1;
            if comments[line].contains(marker) {
                return true;
            }
            let code = code[line].trim();
            let blank = code.is_empty() && comments[line].trim().is_empty();
            if blank || (!code.starts_with("#[") && code.ends_with([';', '{', '}'])) {
                return false;
            }
        }
        false
    }

    /// Whether an attribute `#![…]` sets `lint` to `level`, under a condition or not.
    pub fn has_inner_lint(&self, level: &str, lint: &str) -> bool {
        self.has_lint("#![", level, lint)
    }

    /// Whether an attribute `#[…]` does, somewhere in the file.
    pub fn has_outer_lint(&self, level: &str, lint: &str) -> bool {
        self.has_lint("#[", level, lint)
    }

    fn has_lint(&self, opening: &str, level: &str, lint: &str) -> bool {
        self.code.match_indices(opening).any(|(at, _)| {
            let rest = &self.code[at + opening.len()..];
            let inside = &rest[..rest.find(']').unwrap_or(rest.len())];
            let level = words(inside, level).next();
            level.is_some_and(|level| words(&inside[level..], lint).next().is_some())
        })
    }

    /// The file's name without `.rs`.
    pub fn stem(&self) -> &str {
        stem(&self.path)
    }
}

/// The last component of `path` without its extension; empty if it is not UTF-8.
pub fn stem(path: &Path) -> &str {
    path.file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("")
}

/// Offsets at which `word` stands alone: no letter, digit or underscore on either side.
pub fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part_of_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let bytes = text.as_bytes();
            let before = at.checked_sub(1).is_some_and(|i| part_of_word(bytes[i]));
            let after = bytes
                .get(at + word.len())
                .is_some_and(|&byte| part_of_word(byte));
            !before && !after
        })
}

/// `(code, comments)`.
fn split(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let mut code = blank(bytes);
    let mut comments = blank(bytes);
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            let end = at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
            comments[at..end].copy_from_slice(&bytes[at..end]);
            end
        } else if rest.starts_with(b"/*") {
            let end = at + block_comment_len(rest);
            comments[at..end].copy_from_slice(&bytes[at..end]);
            end
        } else if let Some((prefix, len)) = string_len(bytes, at) {
            code[at..at + prefix].copy_from_slice(&bytes[at..at + prefix]);
            code[at + len - 1] = bytes[at + len - 1];
            at + len
        } else if let Some(len) = char_len(&text[at..]) {
            code[at] = b'\'';
            code[at + len - 1] = b'\'';
            at + len
        } else {
            code[at] = bytes[at];
            at + 1
        };
        at = end;
    }
    // Blanks replace whole literals and comments, which begin and end at character boundaries.
    let to_string = |view: Vec<u8>| String::from_utf8_lossy(&view).into_owned();
    (to_string(code), to_string(comments))
}

fn blank(bytes: &[u8]) -> Vec<u8> {
    let keep = |&byte: &u8| if byte == b'\n' { b'\n' } else { b' ' };
    bytes.iter().map(keep).collect()
}

/// Length of the (nested) block comment that `bytes` begins with.
fn block_comment_len(bytes: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// `(length up to and with the opening quote, whole length)` of the string literal at `at`, if one begins there.
fn string_len(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let inside_word = at
        .checked_sub(1)
        .is_some_and(|i| bytes[i].is_ascii_alphanumeric() || bytes[i] == b'_');
    let rest = &bytes[at..];
    let mut prefix = 0;
    if !inside_word {
        while prefix < 2 && rest.get(prefix).is_some_and(|b| b"bcr".contains(b)) {
            prefix += 1;
        }
    }
    let raw = prefix > 0 && rest[prefix - 1] == b'r';
    let hashes = if raw {
        rest[prefix..].iter().take_while(|&&b| b == b'#').count()
    } else {
        0
    };
    let opening = prefix + hashes + 1;
    if rest.get(opening - 1) != Some(&b'"') {
        return None;
    }
    let mut end = opening;
    while end < rest.len() {
        match rest[end] {
            b'\\' if !raw => end += 1,
            b'"' => {
                let closing = &rest[end + 1..];
                if closing.iter().take(hashes).filter(|&&b| b == b'#').count() == hashes {
                    return Some((opening, end + 1 + hashes));
                }
            }
            _ => {}
        }
        end += 1;
    }
    Some((opening, rest.len()))
}

/// Length of the character literal that `text` begins with; a lifetime is none.
fn char_len(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    let first = inside.chars().next()?;
    if first == '\\' {
        // The escaped character may be a quote itself.
        let end = inside.char_indices().skip(2).find(|&(_, c)| c == '\'')?.0;
        return Some(1 + end + 1);
    }
    let after = &inside[first.len_utf8()..];
    after.starts_with('\'').then_some(1 + first.len_utf8() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> String {
        Source::new("x.rs", text).code
    }

    #[test]
    fn views_keep_offsets_and_lines() {
        let text =
            "let a = \"ä\\\"unsafe\"; // ü unsafe\n/* un /* nested */ safe */ let b = 'ß';\n";
        let source = Source::new("x.rs", text);
        assert_eq!(source.code.len(), text.len());
        assert_eq!(source.comments.len(), text.len());
        assert_eq!(source.code.lines().count(), 2);
        assert_eq!(source.line(text.find("let b").unwrap()), 2);
    }

    #[test]
    fn words_in_comments_and_literals_are_no_code() {
        for text in [
            "// unsafe",
            "/* unsafe */",
            "/* /* */ unsafe */",
            "\"unsafe\"",
            "\"\\\" unsafe\"",
            "b\"unsafe\"",
            "c\"unsafe\"",
            "r\"\\\" ; r#\"\" unsafe\"#",
            "br##\"\"# unsafe\"##",
            "'\\'' ; \"unsafe\"",
        ] {
            assert_eq!(words(&code(text), "unsafe").count(), 0, "{text}");
        }
    }

    #[test]
    fn code_after_literals_is_code() {
        for text in [
            "\"\" unsafe",
            "'\"' unsafe '\"'",
            "'\\'' unsafe",
            "'\\\\' unsafe",
            "fn f<'a>(x: &'a str) { unsafe {} }",
            "r#\"\"# unsafe",
            "r#type unsafe",
            "number\"\" unsafe",
            "/* */ unsafe",
        ] {
            assert_eq!(words(&code(text), "unsafe").count(), 1, "{text}");
        }
    }

    #[test]
    fn words_stand_alone() {
        let text = "unsafe_code unsafe(x) my_unsafe unsafe";
        assert_eq!(words(text, "unsafe").collect::<Vec<_>>(), [12, 32]);
    }

    #[test]
    fn comment_above_stops_at_the_previous_statement() {
        let above = |text: &str| {
            let source = Source::new("x.rs", text);
            let at = words(&source.code, "unsafe").next().unwrap();
            source.comment_above(at, "// SAFETY:")
        };
        assert!(above("// SAFETY: fine\nunsafe { f() }"));
        assert!(above(
            "// SAFETY: fine\n// and more\nlet x =\n    unsafe { f() };"
        ));
        assert!(above(
            "// SAFETY: fine\n#[inline]\nunsafe impl Send for X {}"
        ));
        assert!(above("unsafe { f() } // SAFETY: fine"));
        assert!(!above("// SAFETY: for g\ng();\nunsafe { f() }"));
        assert!(!above("// SAFETY: far away\n\nunsafe { f() }"));
        assert!(!above("let s = \"// SAFETY: \"; unsafe { f() }"));
    }

    #[test]
    fn lint_attributes_are_found() {
        let source = Source::new("x.rs", "#![allow(unsafe_code, reason = \"because\")]\n");
        assert!(source.has_inner_lint("allow", "unsafe_code"));
        assert!(!source.has_outer_lint("allow", "unsafe_code"));
        assert!(!source.has_inner_lint("forbid", "unsafe_code"));
        let source = Source::new("x.rs", "#[allow(unsafe_code)]\nmod x;");
        assert!(source.has_outer_lint("allow", "unsafe_code"));
        let source = Source::new("x.rs", "#![cfg_attr(x, allow(unsafe_code))]");
        assert!(source.has_inner_lint("allow", "unsafe_code"));
        let source = Source::new("x.rs", "// #![allow(unsafe_code)]");
        assert!(!source.has_inner_lint("allow", "unsafe_code"));
    }
}

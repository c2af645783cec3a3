//! What a word is, counting the words of a part of a file, and cutting files where no word stands.
//!
//! A **word** is a longest run of the ASCII letters `A`–`Z` and `a`–`z`; upper and lower case are the same word, shown in
//! lower case. Everything else separates words: "don't" is the words "don" and "t". So these tools count the same:
//!
//! ```sh
//! LC_ALL=C tr -cs A-Za-z '\n' < FILE | tr A-Z a-z | grep . | sort | uniq -c | sort -k1,1nr -k2
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// How often each word occurs.
pub type Counts = HashMap<String, u64>;

/// So much of a file is read at a time.
const BLOCK_BYTES: usize = 256 * 1024;

/// A part of one of the files, with no word across its ends.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Share {
    /// Index of the file.
    pub file: usize,
    /// The part, in bytes.
    pub range: Range<u64>,
}

impl Share {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Cuts a file of `len_bytes` into shares of about `share_bytes`.
pub fn cut(index: usize, file: &File, len_bytes: u64, share_bytes: u64) -> io::Result<Vec<Share>> {
    let mut shares = Vec::new();
    let mut start = 0;
    while start < len_bytes {
        let wanted = start.saturating_add(share_bytes.max(1));
        let end = if wanted >= len_bytes {
            len_bytes
        } else {
            end_of_word(file, wanted, len_bytes)?
        };
        shares.push(Share {
            file: index,
            range: start..end,
        });
        start = end;
    }
    Ok(shares)
}

/// The first place at or after `at` where no letter stands: no word begins before it and ends after it.
fn end_of_word(file: &File, mut at: u64, len_bytes: u64) -> io::Result<u64> {
    let mut block = [0; 256];
    while at < len_bytes {
        let read = file.read_at(&mut block, at)?;
        if read == 0 {
            break; // the file has become shorter
        }
        match block[..read]
            .iter()
            .position(|byte| !byte.is_ascii_alphabetic())
        {
            Some(position) => return Ok((at + position as u64).min(len_bytes)),
            None => at += read as u64,
        }
    }
    Ok(len_bytes)
}

/// Counts the words of a part of a file. Needs memory for a block and for the different words only.
pub fn count(file: &File, range: Range<u64>) -> io::Result<Counts> {
    let mut counter = Counter::default();
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = range.start;
    while at < range.end {
        let wanted =
            usize::try_from(range.end - at).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES));
        match file.read_at(&mut block[..wanted], at) {
            Ok(0) => break, // the file has become shorter
            Ok(read) => {
                counter.feed(&block[..read]);
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(counter.finish())
}

/// Adds the counts of `more` to `counts`.
pub fn add(counts: &mut Counts, more: Counts) {
    for (word, count) in more {
        *counts.entry(word).or_default() += count;
    }
}

/// The words with their counts: most frequent first, equally frequent ones by the alphabet.
pub fn sorted(counts: &Counts) -> Vec<(&str, u64)> {
    let mut table: Vec<_> = counts
        .iter()
        .map(|(word, &count)| (word.as_str(), count))
        .collect();
    table.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    table
}

/// Counts the words of a text that comes in pieces.
#[derive(Default)]
struct Counter {
    counts: Counts,
    /// The word that the last piece may have ended in.
    word: String,
}

impl Counter {
    fn feed(&mut self, text: &[u8]) {
        for &byte in text {
            if byte.is_ascii_alphabetic() {
                self.word.push(byte.to_ascii_lowercase().into());
            } else {
                self.end_word();
            }
        }
    }

    fn end_word(&mut self) {
        if self.word.is_empty() {
            return;
        }
        match self.counts.get_mut(self.word.as_str()) {
            Some(count) => *count += 1,
            None => {
                self.counts.insert(self.word.clone(), 1);
            }
        }
        self.word.clear();
    }

    fn finish(mut self) -> Counts {
        self.end_word();
        self.counts
    }
}

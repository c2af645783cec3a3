//! What is done with the record of a program that is dead: facts, a decision table, acts, and the record is emptied last.
//!
//! **Protocol.** The liveness lock being free is the proof that the last program is dead, so [`recover`] asks for it.
//! Then, under the record's lock:
//!
//! 1. The files. `FILE_ROWS`, A to D, until D is met:
//!
//!    | | compaction | damaged lines | |
//!    |---|---|---|---|
//!    | A | committed | any | keep the damaged lines in the copy, finish the compaction |
//!    | B | draft | any | remove the draft |
//!    | C | none | not kept yet | keep them in the copy beside the record |
//!    | D | none | none, or kept | go on |
//!
//! 2. Each recorded object. `ENTRY_ROWS`, E to J:
//!
//!    | | kind | seen | |
//!    |---|---|---|---|
//!    | E | container | any | forget: its semaphores are recorded each by its own name, or lie in a shared memory object |
//!    | F | shared memory, semaphore | any | unlink |
//!    | G | file | nothing there | forget |
//!    | H | file | a file, link, socket, pipe or device | unlink |
//!    | I | file | a directory | keep |
//!    | J | file | cannot be looked at | keep |
//!
//!    What is to be unlinked and cannot be is kept, too.
//!
//! 3. The end. `END_ROWS`, K to M:
//!
//!    | | kept objects | record | |
//!    |---|---|---|---|
//!    | K | none | any | truncate to nothing |
//!    | L | some | says just that | leave |
//!    | M | some | says more | compact |
//!
//! **Invariants.**
//! 1. Every combination of facts meets exactly one row (tested).
//! 2. An object leaves the record only after it was unlinked or seen to be absent.
//! 3. A failure with one object or line stops nothing else.
//!
//! **If a process dies here.** The record still names all that it named: the next start does the same again, finds
//! some objects absent, and comes to the same end.
//!
//! **Not here.** Whether the program is dead: [`liveness`](crate::liveness). The steps of a compaction:
//! [`log`](crate::log).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use netmcore_sys::crash_point;
use netmcore_sys::error::{Errno, SysError};
use netmcore_sys::record::ObjectKind;

use crate::error::{Error, Result};
use crate::liveness::Liveness;
use crate::log::{Files, Locked, Rewriting};
use crate::object::{KernelObject, Unlinked};
use crate::record::{self, Damaged, Tail};

/// What became of a record that was cleaned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "objects may be left over, and lines unread"]
#[non_exhaustive]
pub struct Recovery {
    /// Objects that were unlinked now.
    pub deleted: Vec<KernelObject>,
    /// Recorded objects that did not exist (any more), and containers, which need no unlinking.
    pub absent: Vec<KernelObject>,
    /// Objects that could not be unlinked, each with the reason. They stay in the record.
    pub kept: Vec<(KernelObject, SysError)>,
    /// Lines in the middle of the record that could not be read. They stand in the copy now.
    pub damaged: Vec<Damaged>,
    /// The file that keeps damaged lines; `None` if there were none.
    pub damaged_copy: Option<PathBuf>,
    /// A last line that a process did not live to finish. Its object was never created, or is still
    /// recorded by the line that registered it.
    pub torn_tail: Option<Damaged>,
    /// The record; empty for one in memory.
    pub record: PathBuf,
}

impl Recovery {
    /// Makes an error of what is left over.
    ///
    /// # Errors
    ///
    /// [`Error::Unlink`] with all objects that were kept; if there are none, [`Error::Damaged`] with the first damaged line.
    /// A torn last line is no error.
    pub fn into_result(self) -> Result<()> {
        if !self.kept.is_empty() {
            return Err(Error::Unlink { objects: self.kept });
        }
        match self.damaged.into_iter().next() {
            Some(damaged) => Err(Error::Damaged {
                path: self.record,
                damaged,
            }),
            None => Ok(()),
        }
    }

    pub(crate) fn keeps(&self, object: &KernelObject) -> bool {
        self.kept.iter().any(|(kept, _)| kept == object)
    }

    /// Step 2 for all of `objects`.
    pub(crate) fn unlink_entries(&mut self, objects: &BTreeSet<KernelObject>) {
        for object in objects {
            let (sight, obstacle) = look_at(object);
            let facts = EntryFacts {
                kind: object.kind(),
                sight,
            };
            let outcome = match the_one(entry_rows(facts)) {
                EntryAction::Forget => Ok(Unlinked::NotThere),
                EntryAction::Keep => Err(obstacle
                    .unwrap_or_else(|| SysError::new("unlink", object.to_string(), Errno::EISDIR))),
                EntryAction::Unlink => object.unlink(),
            };
            crash_point!("pmanage.recovery.unlinked");
            match outcome {
                Ok(Unlinked::Removed) => self.deleted.push(object.clone()),
                Ok(Unlinked::NotThere) => self.absent.push(object.clone()),
                Err(error) => self.kept.push((object.clone(), error)),
            }
        }
    }
}

/// Deletes what a dead program left behind, as its record in `dir` says: `Netsys_pmanage.unlink` at a start.
///
/// The lock is the proof that the program is dead, and that nobody else cleans at the same time.
///
/// ```
/// use netmcore_pmanage::{KernelObject, Liveness, Log, recover};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// # let dir = temporary.path();
/// let left = KernelObject::File(dir.join("left"));
/// Log::open(dir)?.register(&[left.clone()])?;
/// std::fs::write(dir.join("left"), "by a program that died")?;
///
/// let lock = Liveness::acquire(dir)?;
/// let recovery = recover(dir, &lock)?;
/// assert_eq!(recovery.deleted, [left]);
/// assert!(!dir.join("left").exists());
/// assert!(recover(dir, &lock)?.deleted.is_empty());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`Error::Untrusted`] and [`Error::Io`] if the record cannot be read or written. What could not be unlinked or
/// read is in the answer ([`Recovery::into_result`] makes an error of it).
///
/// # Panics
///
/// If `lock` is the lock of another directory.
///
/// # If a process dies
///
/// Killed at any point, it is run again with the same outcome.
pub fn recover(dir: &Path, lock: &Liveness) -> Result<Recovery> {
    lock.assert_of(dir)?;
    clean(&Files::in_directory(dir)?.lock_unsettled()?)
}

/// The three steps.
pub(crate) fn clean(locked: &Locked<'_>) -> Result<Recovery> {
    let mut recovery = Recovery {
        record: locked.path().to_owned(),
        ..Recovery::default()
    };
    let mut kept_lines = 0;
    let (text, objects) = loop {
        let text = locked.read()?;
        let contents = record::parse(&text);
        let facts = FileFacts {
            rewriting: locked.rewriting()?,
            is_damage_pending: contents.damaged.len() > kept_lines,
        };
        match the_one(file_rows(facts)) {
            FileAction::FinishRewriting => {
                recovery.note_damage(locked, locked.finish_rewriting()?);
            }
            FileAction::RemoveDraft => locked.remove_draft()?,
            FileAction::KeepDamaged => {
                locked.keep_damaged(&contents.damaged)?;
                kept_lines = contents.damaged.len();
                recovery.note_damage(locked, contents.damaged);
            }
            FileAction::GoOn => {
                if let Tail::Torn { line, .. } = contents.tail {
                    recovery.torn_tail = Some(line);
                }
                break (text, contents.objects);
            }
        }
        crash_point!("pmanage.recovery.file_settled");
    };

    recovery.unlink_entries(&objects);

    let kept: BTreeSet<KernelObject> = recovery.kept.iter().map(|(o, _)| o.clone()).collect();
    let facts = EndFacts {
        keeps_some: !kept.is_empty(),
        is_compact: record::compact(&kept) == text,
    };
    match the_one(end_rows(facts)) {
        EndAction::Truncate => locked.truncate()?,
        EndAction::Leave => {}
        EndAction::Compact => locked.rewrite(&kept)?,
    }
    crash_point!("pmanage.recovery.ended");
    Ok(recovery)
}

impl Recovery {
    fn note_damage(&mut self, locked: &Locked<'_>, damaged: Vec<Damaged>) {
        if !damaged.is_empty() {
            self.damaged_copy = Some(locked.damaged_path().to_owned());
            self.damaged.extend(damaged);
        }
    }
}

/// What the files look like.
#[derive(Clone, Copy, Debug)]
struct FileFacts {
    rewriting: Rewriting,
    is_damage_pending: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileAction {
    FinishRewriting,
    RemoveDraft,
    KeepDamaged,
    GoOn,
}

const EITHER: &[bool] = &[false, true];

/// Compaction, damage pending; what to do.
#[rustfmt::skip]
const FILE_ROWS: [(Rewriting, &[bool], FileAction); 4] = [
    /* A */ (Rewriting::Committed, EITHER, FileAction::FinishRewriting),
    /* B */ (Rewriting::Draft, EITHER, FileAction::RemoveDraft),
    /* C */ (Rewriting::None, &[true], FileAction::KeepDamaged),
    /* D */ (Rewriting::None, &[false], FileAction::GoOn),
];

/// The actions of all rows that the facts meet: by invariant 1, one.
fn file_rows(facts: FileFacts) -> impl Iterator<Item = FileAction> {
    FILE_ROWS
        .iter()
        .filter(move |(rewriting, is_damage_pending, _)| {
            *rewriting == facts.rewriting && is_damage_pending.contains(&facts.is_damage_pending)
        })
        .map(|(.., action)| *action)
}

/// What stands at a recorded name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    /// Its unlink says all there is to know.
    NotLookedAt,
    Nothing,
    /// Anything that `unlink(2)` takes.
    Unlinkable,
    Directory,
    Obscured,
}

fn look_at(object: &KernelObject) -> (Sight, Option<SysError>) {
    let KernelObject::File(path) = object else {
        return (Sight::NotLookedAt, None);
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => (Sight::Directory, None),
        Ok(_) => (Sight::Unlinkable, None),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            (Sight::Nothing, None)
        }
        Err(e) => {
            let error = SysError::new("lstat", path.display().to_string(), Errno::from_io(&e));
            (Sight::Obscured, Some(error))
        }
    }
}

/// What one recorded object looks like.
#[derive(Clone, Copy, Debug)]
struct EntryFacts {
    kind: ObjectKind,
    sight: Sight,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EntryAction {
    Forget,
    Unlink,
    Keep,
}

const ANY_SIGHT: &[Sight] = &[
    Sight::NotLookedAt,
    Sight::Nothing,
    Sight::Unlinkable,
    Sight::Directory,
    Sight::Obscured,
];

/// Kinds, sights; what to do.
#[rustfmt::skip]
const ENTRY_ROWS: [(&[ObjectKind], &[Sight], EntryAction); 6] = [
    /* E */ (&[ObjectKind::SemContainer], ANY_SIGHT, EntryAction::Forget),
    /* F */ (&[ObjectKind::PosixShm, ObjectKind::PosixSem], ANY_SIGHT, EntryAction::Unlink),
    /* G */ (&[ObjectKind::File], &[Sight::Nothing], EntryAction::Forget),
    /* H */ (&[ObjectKind::File], &[Sight::Unlinkable, Sight::NotLookedAt], EntryAction::Unlink),
    /* I */ (&[ObjectKind::File], &[Sight::Directory], EntryAction::Keep),
    /* J */ (&[ObjectKind::File], &[Sight::Obscured], EntryAction::Keep),
];

/// The actions of all rows that the facts meet: by invariant 1, one.
fn entry_rows(facts: EntryFacts) -> impl Iterator<Item = EntryAction> {
    ENTRY_ROWS
        .iter()
        .filter(move |(kinds, sights, _)| {
            kinds.contains(&facts.kind) && sights.contains(&facts.sight)
        })
        .map(|(.., action)| *action)
}

/// What is left when all objects have had their turn.
#[derive(Clone, Copy, Debug)]
struct EndFacts {
    keeps_some: bool,
    is_compact: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndAction {
    Truncate,
    Leave,
    Compact,
}

/// Keeps some, is compact; what to do.
#[rustfmt::skip]
const END_ROWS: [(bool, &[bool], EndAction); 3] = [
    /* K */ (false, EITHER, EndAction::Truncate),
    /* L */ (true, &[true], EndAction::Leave),
    /* M */ (true, &[false], EndAction::Compact),
];

/// The actions of all rows that the facts meet: by invariant 1, one.
fn end_rows(facts: EndFacts) -> impl Iterator<Item = EndAction> {
    END_ROWS
        .iter()
        .filter(move |(keeps_some, is_compact, _)| {
            *keeps_some == facts.keeps_some && is_compact.contains(&facts.is_compact)
        })
        .map(|(.., action)| *action)
}

fn the_one<A>(mut rows: impl Iterator<Item = A>) -> A {
    match rows.next() {
        Some(action) => action,
        None => unreachable!("a combination of facts without a row"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_facts_meets_exactly_one_row() {
        use ObjectKind::{File, PosixSem, PosixShm, SemContainer};
        for rewriting in [Rewriting::None, Rewriting::Draft, Rewriting::Committed] {
            for is_damage_pending in [false, true] {
                let facts = FileFacts {
                    rewriting,
                    is_damage_pending,
                };
                assert_eq!(file_rows(facts).count(), 1, "{facts:?}");
            }
        }
        for kind in [File, PosixShm, PosixSem, SemContainer] {
            for &sight in ANY_SIGHT {
                let facts = EntryFacts { kind, sight };
                assert_eq!(entry_rows(facts).count(), 1, "{facts:?}");
            }
        }
        for keeps_some in [false, true] {
            for is_compact in [false, true] {
                let facts = EndFacts {
                    keeps_some,
                    is_compact,
                };
                assert_eq!(end_rows(facts).count(), 1, "{facts:?}");
            }
        }
    }

    #[test]
    fn only_what_is_unlinked_or_absent_is_dropped() {
        use ObjectKind::{File, PosixSem, PosixShm, SemContainer};
        let action = |kind, sight| the_one(entry_rows(EntryFacts { kind, sight }));
        assert_eq!(action(File, Sight::Directory), EntryAction::Keep);
        assert_eq!(action(File, Sight::Obscured), EntryAction::Keep);
        assert_eq!(action(File, Sight::Unlinkable), EntryAction::Unlink);
        assert_eq!(action(File, Sight::Nothing), EntryAction::Forget);
        for &sight in ANY_SIGHT {
            assert_eq!(action(PosixShm, sight), EntryAction::Unlink);
            assert_eq!(action(PosixSem, sight), EntryAction::Unlink);
            assert_eq!(action(SemContainer, sight), EntryAction::Forget);
        }
    }
}

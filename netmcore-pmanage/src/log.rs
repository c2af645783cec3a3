//! The record as a file that many processes and threads append to, and its compaction.
//!
//! **Protocol.** `register` the name → create the object … unlink the object → `unregister` the name. Each
//! call opens `netplex.pmanage` afresh, takes the record's lock, reads or appends, and closes.
//!
//! The lock is an open file description lock: it excludes the POSIX lock that the ancestor's tools
//! take on the same file, and the other threads of this process, and no other close gives it up. It is
//! asked for until a deadline: its holder may be stopped, and must not stop everybody else.
//!
//! Compaction happens at start only ([`recover`](crate::recover)) and in place, since the ancestor's tools would go on
//! writing into a renamed file:
//!
//! 1. the new text is written to `netplex.pmanage.draft`
//! 2. the draft is renamed to `netplex.pmanage.journal`: this commits the compaction
//! 3. the record is truncated and the new text written into it
//! 4. the journal is removed.
//!
//! **Invariants.**
//! 1. Nothing is written to the record but under its lock, and nothing but whole lines; what a dead writer left
//!    behind the last LF is cut off or ended before anything is appended.
//! 2. While there is a journal, the set of recorded objects is the journal's lines followed by the record's. Who
//!    takes the lock and finds a journal finishes the compaction first.
//! 3. A damaged line leaves the record only after it stands in `netplex.pmanage.damaged`.
//!
//! **If a process dies here.** Inside an append: see [`record`]. Before step 2: the draft is
//! ignored, and overwritten by the next. Between 2 and 4: by invariant 2 the set is the same whether the
//! record still has its old lines, none, some of the new ones, or all. (Old lines may bring back an object that is unlinked already:
//! recorded without existing, which is harmless.) The lock is freed by the kernel.
//!
//! **Not here.** What may be deleted and when: [`recovery`]. Syncing to disk: the record covers the death of
//! processes, not of the machine.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netmcore_sys::crash_point;
use netmcore_sys::file_lock::{self, OfdGuard};
use netmcore_sys::process;
use netmcore_sys::record::{ObjectKind, Recorder};

use crate::error::{Error, Result, While};
use crate::object::{KernelObject, Unlinked};
use crate::record::{self, Contents, Damaged, Operation, Tail};
use crate::recovery::{self, Recovery};
use crate::trust::{self, Expected};

/// Name of the record in its directory.
pub const RECORD_NAME: &str = "netplex.pmanage";
/// How long the record's lock is waited for.
const LOCK_DEADLINE: Duration = Duration::from_secs(2);
const DRAFT_NAME: &str = "netplex.pmanage.draft";
const JOURNAL_NAME: &str = "netplex.pmanage.journal";
/// Name of the file beside the record that keeps lines which could not be read.
pub const DAMAGED_NAME: &str = "netplex.pmanage.damaged";

/// A record of kernel-persistent objects: `Netsys_pmanage.pmanage`.
///
/// Cheap to clone; usable from all threads and, as it holds no descriptor and no lock between calls, on both sides of a fork.
///
/// ```
/// use netmcore_pmanage::{KernelObject, Log, Unlinked};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temporary = tempfile::tempdir()?;
/// let dir = temporary.path().join("sockets");
/// netmcore_pmanage::prepare_directory(&dir)?;
/// let log = Log::open(&dir)?;
///
/// let file = KernelObject::File(dir.join("scratch"));
/// log.register(&[file.clone()])?;                // first the record,
/// std::fs::write(dir.join("scratch"), "data")?;  // then the object
/// assert_eq!(log.registered()?, [file.clone()]);
///
/// assert_eq!(log.unlink_this(&file)?, Unlinked::Removed);
/// assert!(log.registered()?.is_empty());
/// assert!(log.register(&[KernelObject::File("relative".into())]).is_err());
/// # Ok(())
/// # }
/// ```
#[doc(alias = "pmanage")]
#[derive(Clone, Debug)]
pub struct Log(Arc<Place>);

#[derive(Debug)]
enum Place {
    File(Files),
    Memory(Mutex<BTreeSet<KernelObject>>),
}

impl Log {
    /// Opens the record in `dir`, and makes it (mode 0600) if there is none. Reads nothing and cleans nothing:
    /// that is [`recover`](crate::recover)'s work, and may be left out to keep an old record as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`] if others can write the directory or the record; [`Error::Io`], also if the directory
    /// does not exist ([`prepare_directory`](crate::prepare_directory) makes it).
    pub fn open(dir: &Path) -> Result<Log> {
        let files = Files::in_directory(dir)?;
        drop(files.lock()?);
        Ok(Log(Arc::new(Place::File(files))))
    }

    /// A record in this process's memory: `Netsys_pmanage.fake_pmanage`. It does all that a file
    /// does but survive the process; after a fork each side has its own.
    #[doc(alias = "fake_pmanage")]
    pub fn in_memory() -> Log {
        Log(Arc::new(Place::Memory(Mutex::default())))
    }

    /// Records that these objects may exist from now on, with one append. Call it *before* creating them. Registering what is
    /// registered changes nothing.
    ///
    /// # Errors
    ///
    /// Then none of them must be created: [`Error::InvalidName`] if one has an impossible name (none is recorded then),
    /// [`Error::Untrusted`], [`Error::Io`].
    ///
    /// # If a process dies
    ///
    /// Killed inside, some of the names, the first ones, may be recorded. That does no harm: the objects do not exist.
    ///
    /// # Blocking
    ///
    /// While another process or thread reads or appends; two seconds at the most, then [`Error::Io`].
    pub fn register(&self, objects: &[KernelObject]) -> Result<()> {
        self.append(Operation::Register, objects)
    }

    /// Records that these objects do not exist any more, with one append. Call it *after* unlinking them. Unregistering what is
    /// not registered changes nothing.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register); the objects stay recorded then, which does no harm.
    ///
    /// # Blocking
    ///
    /// While another process or thread reads or appends; two seconds at the most, then [`Error::Io`].
    pub fn unregister(&self, objects: &[KernelObject]) -> Result<()> {
        self.append(Operation::Unregister, objects)
    }

    fn append(&self, operation: Operation, objects: &[KernelObject]) -> Result<()> {
        for object in objects {
            object.check()?;
        }
        if objects.is_empty() {
            return Ok(());
        }
        match &*self.0 {
            Place::Memory(set) => {
                let mut set = held(set);
                for object in objects {
                    match operation {
                        Operation::Register => set.insert(object.clone()),
                        Operation::Unregister => set.remove(object),
                    };
                }
                Ok(())
            }
            Place::File(files) => {
                let mut text = Vec::new();
                for object in objects {
                    record::encode(operation, object, &mut text);
                }
                files.lock()?.append(&text)
            }
        }
    }

    /// The registered objects, sorted. Lines that cannot be read are left out; [`contents`](Self::contents) tells them.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`], [`Error::Io`].
    ///
    /// # Blocking
    ///
    /// While another process or thread reads or appends; two seconds at the most, then [`Error::Io`].
    pub fn registered(&self) -> Result<Vec<KernelObject>> {
        Ok(self.contents()?.objects.into_iter().collect())
    }

    /// All that the record says, with its damage.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`], [`Error::Io`].
    ///
    /// # Blocking
    ///
    /// While another process or thread reads or appends; two seconds at the most, then [`Error::Io`].
    pub fn contents(&self) -> Result<Contents> {
        match &*self.0 {
            Place::Memory(set) => Ok(Contents {
                objects: held(set).clone(),
                ..Contents::default()
            }),
            Place::File(files) => Ok(record::parse(&files.lock()?.read()?)),
        }
    }

    /// Unlinks all registered objects, whoever uses them, and empties the record but for those that could not be
    /// unlinked. What an orderly end does last.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`], [`Error::Io`]. Objects that could not be unlinked and damaged lines are in the answer
    /// ([`Recovery::into_result`] makes an error of them).
    ///
    /// # If a process dies
    ///
    /// What it did not come to is still recorded; the next call, or the next start, does it.
    ///
    /// # Blocking
    ///
    /// While another process or thread reads or appends, two seconds at the most (then [`Error::Io`]); they wait
    /// meanwhile, too.
    pub fn unlink_all(&self) -> Result<Recovery> {
        match &*self.0 {
            Place::Memory(set) => {
                let mut set = held(set);
                let mut recovery = Recovery::default();
                recovery.unlink_entries(&set);
                set.retain(|object| recovery.keeps(object));
                Ok(recovery)
            }
            Place::File(files) => recovery::clean(&files.lock()?),
        }
    }

    /// Unlinks one object, then unregisters it: `Netsys_pmanage.unlink_this`, with the record kept true.
    ///
    /// # Errors
    ///
    /// [`Error::Unlink`] if it could not be unlinked; it stays in the record then. [`Error::InvalidName`],
    /// [`Error::Untrusted`] and [`Error::Io`] as for [`unregister`](Self::unregister).
    ///
    /// # If a process dies
    ///
    /// Killed between the two steps, it leaves a recorded name without an object, which does no harm.
    pub fn unlink_this(&self, object: &KernelObject) -> Result<Unlinked> {
        object.check()?;
        match object.unlink() {
            Ok(unlinked) => {
                crash_point!("pmanage.log.unlinked");
                self.unregister(std::slice::from_ref(object))?;
                Ok(unlinked)
            }
            Err(error) => Err(Error::Unlink {
                objects: vec![(object.clone(), error)],
            }),
        }
    }

    /// Where the record is; `None` for one in memory.
    pub fn path(&self) -> Option<&Path> {
        match &*self.0 {
            Place::File(files) => Some(&files.record),
            Place::Memory(_) => None,
        }
    }
}

/// One object at a time, for those who create one.
impl Recorder for Log {
    fn register(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        let object = KernelObject::new(kind, name).map_err(Error::from)?;
        Ok(Log::register(self, &[object])?)
    }

    fn unregister(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        let object = KernelObject::new(kind, name).map_err(Error::from)?;
        Ok(Log::unregister(self, &[object])?)
    }
}

/// The set is whole after every step, so a panic elsewhere is no reason to refuse it.
fn held(set: &Mutex<BTreeSet<KernelObject>>) -> MutexGuard<'_, BTreeSet<KernelObject>> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The paths of the record and its companions.
#[derive(Debug)]
pub(crate) struct Files {
    dir: PathBuf,
    record: PathBuf,
    draft: PathBuf,
    journal: PathBuf,
    damaged: PathBuf,
}

impl Files {
    pub(crate) fn in_directory(dir: &Path) -> Result<Files> {
        let dir = trust::absolute(dir)?;
        Ok(Files {
            record: dir.join(RECORD_NAME),
            draft: dir.join(DRAFT_NAME),
            journal: dir.join(JOURNAL_NAME),
            damaged: dir.join(DAMAGED_NAME),
            dir,
        })
    }

    /// Locks the record as it is, a pending compaction included.
    pub(crate) fn lock_unsettled(&self) -> Result<Locked<'_>> {
        loop {
            trust::check_directory(&self.dir)?;
            let file = trust::open_or_create(&self.record)?;
            let guard = self.lock_in_time(file)?;
            // Whoever held the lock before may have removed the file.
            if trust::still_leads_to(&self.record, guard.file())? {
                return Ok(Locked { files: self, guard });
            }
        }
    }

    /// The lock is held for microseconds by whoever lives: a holder that is stopped must not stop all
    /// others with it. As long as the record changes, others are at work, and it is only not yet our turn.
    fn lock_in_time(&self, file: File) -> Result<OfdGuard> {
        let state = || -> Result<_> {
            let metadata = file.metadata().on(&self.record, "cannot look at")?;
            Ok((metadata.len(), metadata.modified().ok()))
        };
        let mut seen = state()?;
        let mut deadline = Instant::now() + LOCK_DEADLINE;
        let mut pause = Duration::from_micros(50);
        while !file_lock::ofd_try_lock(file.as_fd()).on(&self.record, "cannot lock")? {
            if Instant::now() >= deadline {
                let now = state()?;
                if now == seen {
                    let source = io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!(
                            "another process has held its lock for {LOCK_DEADLINE:?}; is it stopped?"
                        ),
                    );
                    return Err(source).on(&self.record, "cannot lock");
                }
                seen = now;
                deadline = Instant::now() + LOCK_DEADLINE;
            }
            // sleep: the kernel has no wait for this lock that ends by itself.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
        // The descriptor has the lock already.
        OfdGuard::lock(file).on(&self.record, "cannot lock")
    }

    /// Locks the record, with a pending compaction finished.
    fn lock(&self) -> Result<Locked<'_>> {
        let locked = self.lock_unsettled()?;
        locked.finish_rewriting()?;
        Ok(locked)
    }
}

/// How far a compaction came whose process is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rewriting {
    /// There is none.
    None,
    /// Steps 1 to 2: only a draft.
    Draft,
    /// Steps 2 to 4: a journal.
    Committed,
}

/// The record, opened and locked.
pub(crate) struct Locked<'a> {
    files: &'a Files,
    guard: OfdGuard,
}

impl Locked<'_> {
    pub(crate) fn path(&self) -> &Path {
        &self.files.record
    }

    pub(crate) fn damaged_path(&self) -> &Path {
        &self.files.damaged
    }

    pub(crate) fn read(&self) -> Result<Vec<u8>> {
        read_all(self.guard.file()).on(&self.files.record, "cannot read")
    }

    pub(crate) fn rewriting(&self) -> Result<Rewriting> {
        let exists = |path: &Path| -> Result<bool> {
            Ok(trust::look(path, Expected::RegularFile)?.is_some())
        };
        if exists(&self.files.journal)? {
            Ok(Rewriting::Committed)
        } else if exists(&self.files.draft)? {
            Ok(Rewriting::Draft)
        } else {
            Ok(Rewriting::None)
        }
    }

    /// Appends whole lines, behind whole lines.
    fn append(&self, text: &[u8]) -> Result<()> {
        let file = self.guard.file();
        let path = &self.files.record;
        let end = self.mend_tail()?;
        crash_point!("pmanage.log.tail_mended");
        if let Err(error) = write_at(file, text, end) {
            // Half a line would be cut off by the next writer. Better now, while the caller can be told:
            // if this fails too, that writer does it.
            let _ = file.set_len(end);
            return Err(error).on(path, "cannot append to");
        }
        crash_point!("pmanage.log.appended");
        Ok(())
    }

    /// Cuts off or ends what a dead writer left behind the last LF; gives the record's length.
    fn mend_tail(&self) -> Result<u64> {
        let file = self.guard.file();
        let path = &self.files.record;
        let len = file.metadata().on(path, "cannot look at")?.len();
        if len == 0 {
            return Ok(0);
        }
        let mut last = [0];
        file.read_exact_at(&mut last, len - 1)
            .on(path, "cannot read")?;
        if last == [b'\n'] {
            return Ok(len);
        }
        let text = self.read()?;
        let (keep_bytes, is_unended) = match record::parse(&text).tail {
            Tail::Whole => (text.len(), false),
            Tail::Padded { keep_bytes } | Tail::Torn { keep_bytes, .. } => (keep_bytes, false),
            Tail::Unended { keep_bytes } => (keep_bytes, true),
        };
        let mut end = keep_bytes as u64;
        if end < len {
            file.set_len(end).on(path, "cannot truncate")?;
            crash_point!("pmanage.log.tail_cut");
        }
        if is_unended {
            write_at(file, b"\n", end).on(path, "cannot append to")?;
            end += 1;
        }
        Ok(end)
    }

    /// Empties the record. One step.
    pub(crate) fn truncate(&self) -> Result<()> {
        self.guard
            .file()
            .set_len(0)
            .on(&self.files.record, "cannot truncate")
    }

    /// Puts `objects` in the place of all lines.
    pub(crate) fn rewrite(&self, objects: &BTreeSet<KernelObject>) -> Result<()> {
        let Files {
            record,
            draft,
            journal,
            ..
        } = self.files;
        let text = record::compact(objects);
        {
            let file = trust::open_or_create(draft)?;
            file.set_len(0).on(draft, "cannot truncate")?;
            crash_point!("pmanage.log.draft_made");
            write_at(&file, &text, 0).on(draft, "cannot write")?;
        }
        crash_point!("pmanage.log.draft_written");
        fs::rename(draft, journal).on(draft, "cannot rename")?;
        crash_point!("pmanage.log.journal_committed");
        let file = self.guard.file();
        file.set_len(0).on(record, "cannot truncate")?;
        crash_point!("pmanage.log.record_truncated");
        write_at(file, &text, 0).on(record, "cannot write")?;
        crash_point!("pmanage.log.record_written");
        trust::remove(journal)
    }

    /// Finishes a compaction that has a journal: the set is the journal's lines, then the record's. Gives the
    /// record's damaged lines, which are kept beside it.
    pub(crate) fn finish_rewriting(&self) -> Result<Vec<Damaged>> {
        let Some(journal) = trust::open(&self.files.journal)? else {
            return Ok(Vec::new());
        };
        let mut text = read_all(&journal).on(&self.files.journal, "cannot read")?;
        let lines = self.read()?;
        let damaged = record::parse(&lines).damaged;
        self.keep_damaged(&damaged)?;
        text.extend_from_slice(&lines);
        self.rewrite(&record::parse(&text).objects)?;
        Ok(damaged)
    }

    pub(crate) fn remove_draft(&self) -> Result<()> {
        trust::remove(&self.files.draft)
    }

    /// Copies damaged lines to the file beside the record, those that it has already left out.
    pub(crate) fn keep_damaged(&self, damaged: &[Damaged]) -> Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        let path = &self.files.damaged;
        let file = trust::open_or_create(path)?;
        let text = read_all(&file).on(path, "cannot read")?;
        let mut known: HashSet<&[u8]> = text.split(|&b| b == b'\n').collect();
        let mut more = Vec::new();
        if !text.is_empty() && !text.ends_with(b"\n") {
            more.push(b'\n');
        }
        for line in damaged {
            if known.insert(&line.bytes) {
                more.extend_from_slice(&line.bytes);
                more.push(b'\n');
            }
        }
        write_at(&file, &more, text.len() as u64).on(path, "cannot write")
    }
}

/// Writes all of it, or says that it would be more than this process may write to a file: the kernel would say so by SIGXFSZ, which kills.
pub(crate) fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let limit = process::get_limit(process::Resource::FileSizeBytes)?.soft;
    let end = at + bytes.len() as u64;
    if let Some(limit) = limit.filter(|&limit| limit < end) {
        let why = format!(
            "this process may write no file of more than {limit} bytes (`ulimit -f`), and {end} are needed"
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    file.write_all_at(bytes, at)
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut text = Vec::new();
    text.try_reserve_exact(len)?;
    text.resize(len, 0);
    file.read_exact_at(&mut text, 0)?;
    Ok(text)
}

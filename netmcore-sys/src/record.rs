//! The hook through which creators of kernel-persistent objects announce them.
//!
//! **Protocol.** Register the name, then create the object; unlink the object, then unregister the name.
//! So at every instant an object is recorded or does not exist, whatever process dies between two steps.
//!
//! **If a process dies here.** Between registering and creating: a recorded name without an object, which
//! a later clean-up finds absent. Between unlinking and unregistering: the same.
//!
//! **Not here.** A record that survives the process: `netmcore-pmanage`.

use std::io;

/// Kinds of objects that outlive the process that made them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// A file; the name is its absolute path.
    File,
    /// A POSIX shared memory object; the name is an [`ObjectName`](crate::name::ObjectName).
    PosixShm,
    /// A named POSIX semaphore; the name is an [`ObjectName`](crate::name::ObjectName).
    PosixSem,
    /// A family of named semaphores; the name is their common prefix, which begins with `/`.
    SemContainer,
}

/// Keeps account of objects that outlive their process, so that they can be removed after its death.
pub trait Recorder {
    /// Records that an object of this name may exist from now on. Called before it is created.
    ///
    /// # Errors
    ///
    /// When the name cannot be recorded; the object must then not be created.
    fn register(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()>;

    /// Records that no object of this name exists any more. Called after it is unlinked.
    ///
    /// # Errors
    ///
    /// When that cannot be recorded; the name then stays in the record, which does no harm.
    fn unregister(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()>;
}

/// Records nothing: for programs that clean up by other means.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRecord;

impl Recorder for NoRecord {
    fn register(&self, _: ObjectKind, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn unregister(&self, _: ObjectKind, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

impl<R: Recorder + ?Sized> Recorder for &R {
    fn register(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        (**self).register(kind, name)
    }

    fn unregister(&self, kind: ObjectKind, name: &[u8]) -> io::Result<()> {
        (**self).unregister(kind, name)
    }
}

//! A record whose changes are visible to the parent of a process that is killed: files in a folder.

use netmcore_sem::{ObjectKind, Recorder};
use std::collections::BTreeSet;
use std::io;

pub struct Folder(std::path::PathBuf);

impl Folder {
    pub fn new() -> Folder {
        let name = format!("sem-record-{}", netmcore_sys::process::random_u64());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub fn path_of(&self, name: &[u8]) -> std::path::PathBuf {
        self.0.join(std::str::from_utf8(&name[1..]).unwrap())
    }

    /// The names that are recorded now.
    #[allow(dead_code, reason = "not every test asks")]
    pub fn names(&self) -> BTreeSet<Vec<u8>> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_encoded_bytes());
        names.map(|name| [b"/", &name[..]].concat()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

impl Recorder for Folder {
    fn register(&self, _: ObjectKind, name: &[u8]) -> io::Result<()> {
        std::fs::write(self.path_of(name), "")
    }

    /// A set, not a count: what is not recorded is no error.
    fn unregister(&self, _: ObjectKind, name: &[u8]) -> io::Result<()> {
        match std::fs::remove_file(self.path_of(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

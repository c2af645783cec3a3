//! The two kinds of numbers that name things for the life of a program: processes and resources.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names one process of a program: a sequential number, never used twice while the program runs.
///
/// It is not the Unix process id, which the kernel reuses. It may be sent to any other process of the program.
///
/// ```
/// use netmcore_proc::ProcessId;
///
/// let process = ProcessId::from_raw(7);
/// assert_eq!(process.to_string(), "Process 7");
/// assert_eq!(process.get(), 7);
/// ```
#[doc(alias = "process_id")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ProcessId(u64);

impl ProcessId {
    /// Makes the id with this number; whether there is such a process is found out when it is used.
    pub const fn from_raw(number: u64) -> Self {
        ProcessId(number)
    }

    /// Returns the number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process {}", self.0)
    }
}

/// Names one managed resource of a program: a sequential number, never used twice while the program runs.
///
/// It may be sent to any other process of the program.
///
/// ```
/// use netmcore_proc::ResourceId;
///
/// let resource = ResourceId::from_raw(7);
/// assert_eq!(resource.to_string(), "Resource 7");
/// assert_eq!(resource.get(), 7);
/// ```
#[doc(alias = "res_id")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ResourceId(u64);

impl ResourceId {
    /// Makes the id with this number; whether there is such a resource is found out when it is used.
    pub const fn from_raw(number: u64) -> Self {
        ResourceId(number)
    }

    /// Returns the number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resource {}", self.0)
    }
}

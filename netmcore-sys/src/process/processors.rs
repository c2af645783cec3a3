//! Which processors this process may run on: `sched_getaffinity(2)`, `sched_setaffinity(2)`.

use std::thread;

use rustix::thread::CpuSet;

use crate::error::During;

/// Returns how many processors the calling thread may run on; at least 1.
///
/// This is the affinity mask, not the quota of a control group: with a quota of half a processor the answer still
/// is at least 1.
pub fn available_processors() -> usize {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (set.count() as usize).max(1),
        // A machine with more processors than the mask has bits (1024): std looks with a mask that grows.
        Err(_) => thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Returns the numbers of the processors that the calling thread may run on, ascending.
///
/// # Errors
///
/// `EINVAL` on a machine with more than 1024 processors.
pub fn get_affinity() -> crate::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).during("sched_getaffinity", "this thread")?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&processor| set.is_set(processor))
        .collect())
}

/// Lets the calling thread run on these processors only. Threads and processes that it makes later inherit this.
///
/// # Errors
///
/// `EINVAL` if none of them exists and is allowed to this process, or a number is 1024 or more.
pub fn set_affinity(processors: &[usize]) -> crate::Result<()> {
    let mut set = CpuSet::new();
    let in_range = processors
        .iter()
        .all(|&processor| processor < CpuSet::MAX_CPU);
    if in_range {
        processors.iter().for_each(|&processor| set.set(processor));
    }
    // Left empty, the mask is refused by the kernel with the very error that we want.
    rustix::thread::sched_setaffinity(None, &set).during(
        "sched_setaffinity",
        format_args!("processors {processors:?}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Errno;

    #[test]
    fn affinity_narrows_and_widens() {
        // In a thread of its own: the mask belongs to the thread.
        thread::spawn(|| {
            let all = get_affinity().unwrap();
            assert_eq!(all.len(), available_processors());
            set_affinity(&all[..1]).unwrap();
            assert_eq!(get_affinity().unwrap(), all[..1]);
            assert_eq!(available_processors(), 1);
            set_affinity(&all).unwrap();
            assert_eq!(get_affinity().unwrap(), all);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn affinity_to_nothing_is_einval() {
        assert_eq!(set_affinity(&[]).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(set_affinity(&[4096]).unwrap_err().errno, Errno::EINVAL);
    }
}

//! Locks on files: flock(2) and open file description locks.

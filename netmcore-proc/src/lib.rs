//! A master that forks workers, typed processes, and resources that never leak.

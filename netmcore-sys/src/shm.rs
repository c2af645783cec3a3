//! POSIX shared memory objects and anonymous memory files.

//! POSIX semaphores, named and in memory.

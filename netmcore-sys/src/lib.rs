//! System calls for process-parallel programs on Linux: owned, typed, tested against the kernel.

//! Waiting on and waking a 32-bit word in shared memory.

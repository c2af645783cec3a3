//! Process-parallel computing: a lean master, typed worker processes, shared memory, and nothing left behind.

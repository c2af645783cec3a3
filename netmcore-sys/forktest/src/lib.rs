//! Runs each test in a fresh single-threaded process.

//! Places where a test can kill the process.

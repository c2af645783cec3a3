//! The record of kernel-persistent objects, and recovery from it.

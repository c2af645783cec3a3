//! Shared memory at one address: objects, arena, pages and blocks.

//! Process-shared semaphores and locks that survive a dead owner.

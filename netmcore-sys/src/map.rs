//! Address ranges: reserved, mapped, populated, given back.

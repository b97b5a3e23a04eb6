//! Distributed state behind one trait, with swappable backends.

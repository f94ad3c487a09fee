"""One file an objective; `pearl.objectives` is the entry-point group for further ones."""

"""Command lines: thin wrappers over the library."""

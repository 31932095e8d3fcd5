"""A language model: named, read, masked, changed. Knows no coder."""

"""Names to coders: what has been released, and where it lies."""

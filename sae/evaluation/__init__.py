"""Every figure, defined once."""

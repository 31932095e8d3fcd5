"""Text to token rows, made once."""

"""Edits of latents while a language model reads and writes: what it says with them, and by how much that changes it."""

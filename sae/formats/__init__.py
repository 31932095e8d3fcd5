"""Formats: how coders lie on disk. One format a file, each with `detect(folder)` and `read(folder)`."""

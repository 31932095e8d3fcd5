"""Bytes of strangers, read without trust."""

"""Tokens to activation batches, in a fixed order."""

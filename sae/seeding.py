"""Randomness keyed by name: a draw depends on (seed, what it is for, which one), never on what was drawn before."""

from hashlib import blake2b

import torch


def generator(seed: int, *key: str | int) -> torch.Generator:
    """Returns a CPU generator for one draw, for example `generator(0, "rows", epoch)`."""
    digest = blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

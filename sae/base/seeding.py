"""Randomness keyed by name: a draw depends on (seed, what it is for, which one), never on what was drawn before."""

from hashlib import blake2b

import torch


def keyed_hash(*key: str | int, size: int) -> bytes:
    """Returns so many bytes that depend on the key alone."""
    return blake2b(repr(key).encode(), digest_size=size).digest()


def generator(seed: int, *key: str | int) -> torch.Generator:
    """Returns a CPU generator for one draw, for example `generator(0, "rows", epoch)`."""
    return torch.Generator().manual_seed(int.from_bytes(keyed_hash(seed, *key, size=8), "little") >> 1)


def uniform(purpose: str, name: str) -> float:
    """Returns a number in [0, 1) from a hash of a name; the purpose keys it, so that two uses are independent."""
    digest = blake2b(name.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64

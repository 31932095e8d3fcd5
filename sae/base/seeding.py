"""Randomness keyed by name: a draw depends on (seed, what it is for, which one), never on what was drawn before."""

from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import UInt64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it are far apart."""
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


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


def mixed(x: UInt64[np.ndarray, "n"], steps: int = 2) -> UInt64[np.ndarray, "n"]:
    """Returns numbers that look drawn at random, one for each of x: splitmix64's finalizer, or its first step alone."""
    for shift, factor in _STEPS[:steps]:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(_STEPS[steps][0]))

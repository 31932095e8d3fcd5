"""What the evidence pass costs beside the models: entries a second and memory, on recorded codes.

    python tests/benchmarks/evidence.py [--d-sae 32768] [--l0 64] [--tokens 1000000] [--context 256]

Eight blocks of codes, in which latents differ in frequency by a factor of hundreds, are given to a tally again and
again, as if they were the codes of ever more text. Printed are, after so many tokens, the entries (codes that are not
zero) a second since the last line, and how far the memory of the process has grown since before the tally was made.
Targets on two idle cores, with the defaults: 5 million entries a second, and less than 300 MB, flat from 100,000 tokens
on. The memory of a tally is linear in the number of latents and in nothing else: about 4 KB each.
"""

import argparse
import time

import numpy as np
import psutil
import torch

from interp.evidence.tally import Sizes, Tally
from sae.kernels.codes import SparseLatents

BLOCK_TOKENS, RECORDED = 4096, 8
SHARES = (0.4, 0.2, 0.4)


def recorded(d_sae: int, l0: int, tokens: int, seed: int) -> SparseLatents:
    """Returns codes of some tokens; a latent's rate falls with its id, as 1 / sqrt(id)."""
    draw = np.random.default_rng(seed)
    ids = np.sort((d_sae * draw.random((tokens, l0)) ** 2).astype(np.int64), 1)
    fresh = np.diff(ids, axis=1, prepend=-1) > 0  # a latent fires once on a token
    values = draw.gamma(1, 2, ids.shape).astype(np.float32) + 1e-3
    offsets = np.append(0, np.cumsum(fresh.sum(1)))
    parts = (torch.from_numpy(part) for part in (offsets, ids[fresh], values[fresh]))
    return SparseLatents(*parts, d_sae)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--d-sae", 32_768), ("--l0", 64), ("--tokens", 1_000_000), ("--context", 256)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    n_rows = max(1, BLOCK_TOKENS // options.context)
    codes = [recorded(options.d_sae, options.l0, n_rows * options.context, seed) for seed in range(RECORDED)]
    rows, places = np.repeat(np.arange(n_rows), options.context), np.tile(np.arange(options.context), n_rows)
    draw = np.random.default_rng(0)

    process = psutil.Process()
    before = process.memory_info().rss
    tally = Tally(options.d_sae, options.context, Sizes(), 0)
    print(f"{'tokens':>12}{'entries/s':>14}{'memory':>12}")
    since, spent, peak, shown = 0, 0.0, 0, 0
    block = 0
    while block * len(rows) < options.tokens:
        names = draw.integers(0, 2**62, n_rows)
        splits = draw.choice(3, n_rows, p=SHARES).astype(np.int8)
        numbers = np.arange(block * n_rows, (block + 1) * n_rows)
        began = time.perf_counter()
        tally.add(codes[block % RECORDED], rows, places, names, splits, numbers)
        spent += time.perf_counter() - began
        since += codes[block % RECORDED].values.numel()
        block += 1
        peak = max(peak, process.memory_info().rss - before)
        if block * len(rows) >= min(shown + 100_000, options.tokens):
            print(f"{block * len(rows):>12,}{since / spent / 1e6:>12.1f} M{peak / 1e6:>9.0f} MB")
            shown, since, spent = block * len(rows), 0, 0.0
    state = tally.state()
    print(f"{sum(t.numel() * t.element_size() for t in state.values()) / options.d_sae:.0f} bytes a latent are kept")


if __name__ == "__main__":
    main()

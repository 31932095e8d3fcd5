"""memory.py [NAME ...] [--ranks 1,2,4]: the peak of every rank beside what is estimated, for configs of other weight.

name          what holds the most
topk          the interpreter, and statistics
wide          a coder of 65,536 latents, with gradients and moments
pool          64 lanes of long blocks
gradient      effects of latents beside scores
mutual        scores of a large batch
model FOLDER  a language model of its own: --model FOLDER
"""

import argparse
import tempfile
from pathlib import Path

from rigs.peaks import peaks

SHORT = ["--tokens", "8192", "--eval.tokens", "4096", "--text.max_tokens", "200000"]
CONFIGS = {
    "topk": [],
    "wide": ["--coder.d_sae", "65536"],
    "pool": ["--text.context_length", "256", "--activations.block_rows", "32"],
    "gradient": ["--config", "gradient", "--coder.d_sae", "8192", "--batch_tokens", "4096"],
    "mutual": ["--config", "mutual_choice", "--batch_tokens", "8192", "--tokens", "65536"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CONFIGS))
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--model", default="")
    given = parser.parse_args()
    model = ["--on", "smollm2", "--model.name", given.model, "--text.source", "quickstart", "--text.name", "none"]
    print("config     ranks  estimated  measured  ratio   others: estimated  measured  ratio", flush=True)
    for name in given.names:
        for n in map(int, given.ranks.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                argv = [*SHORT, *(model if name == "model" else CONFIGS[name])]
                first, *others = peaks(n, argv, Path(folder) / "run")
            said, was = first["estimated"], first["peak"]
            line = f"{name:10} {n:5} {said / 1e6:10.0f} {was / 1e6:9.0f} {said / was:6.2f}"
            if others:
                most = max(other["peak"] for other in others)
                line += f" {first['others'] / 1e6:19.0f} {most / 1e6:9.0f} {first['others'] / most:6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()

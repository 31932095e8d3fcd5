"""A planted coder: its codes are a plain function of token rows, so that what evidence says can be checked against it.

The text is made of words, one token each, drawn at random. Of the latents, some have a part to play (see below); every
other one fires on five words, unless the word before forbids it, and its strength depends on word and place.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_tokenizer

from interp.evidence.codes import Coded
from interp.evidence.corpus import INDEX, TOKENS, Corpus, corpus_of_text
from interp.evidence.examples import ExampleConfig, ExampleMaker
from interp.evidence.first_pass import Keep, gather_evidence
from interp.evidence.places import Plan, plan_places
from interp.evidence.second_pass import Visits, visit_places
from interp.evidence.tally import Evidence, Sizes
from sae.base.progress import Watch
from sae.base.store import ShardWriter
from sae.kernels.codes import SparseLatents
from sae.text.decode import Decoder
from sae.text.documents import TextConfig

WORDS = tuple(f"w{number}" for number in range(200))
FIRST_WORD = 4  # behind <s>, </s>, <pad> and <unk>
D_SAE = 64
DENSE, DEAD, RARE, CONTEXT, NEGATIVE = range(5)
"""Fires everywhere; never; on the last word, which is rare; on word 0 if word 1 stood before it in the row; below 0."""
ORDINARY = range(5, D_SAE)
SIZES = Sizes(explain=60, valid=40, test=80, top=8)
CONTEXT_LENGTH = 64


def dense(tokens: np.ndarray, d_sae: int = D_SAE) -> np.ndarray:
    """Returns the codes [rows, context, d_sae] of token rows, 0 at BOS, padding and the first place."""
    tokens = np.asarray(tokens, np.int64)
    word = tokens - FIRST_WORD
    before = np.roll(word, 1, axis=1)
    place = np.arange(tokens.shape[1])
    out = np.zeros((*tokens.shape, d_sae), np.float32)
    out[..., DENSE] = 0.5 + word % 7
    out[..., RARE] = 3.0 * (word == len(WORDS) - 1)
    out[..., CONTEXT] = (2.0 + place % 3) * ((word == 0) & (np.cumsum(word == 1, axis=1) > 0))
    out[..., NEGATIVE] = -1.0 * (word % 40 == 7) * (1 + place % 5)
    for latent in range(5, d_sae):
        allowed = (word % 40 == latent % 40) & ((before + latent) % 3 > 0)
        out[..., latent] = allowed * (1.0 + (word // 40 + 3 * place + latent) % 11)
    out[word < 0] = 0
    out[:, 0] = 0
    return out


def planted(tokens: torch.Tensor, d_sae: int = D_SAE) -> Coded:
    """Returns the codes of rows of text; some entries of the support are 0, as of a JumpReLU coder."""
    ids = tokens.numpy().astype(np.int64)
    codes = dense(ids, d_sae)
    keep = ids >= FIRST_WORD
    keep[:, 0] = False
    rows, places = keep.nonzero()
    codes = codes[rows, places]
    support = codes != 0
    support[np.arange(len(rows)), (rows + places) % codes.shape[1]] = True
    offsets = np.append(0, np.cumsum(support.sum(1)))
    latents = SparseLatents(
        torch.from_numpy(offsets),
        torch.from_numpy(support.nonzero()[1]),
        torch.from_numpy(codes[support]),
        codes.shape[1],
    )
    return Coded(latents, rows, places)


class PlantedCodes:
    """The planted codes of a corpus; it may be told which pass reads them."""

    d_sae = D_SAE

    def __init__(self, rows: Corpus, reader: str = "", seed: int = 0) -> None:
        self.rows, self.reader, self.seed = rows, reader, seed

    def read(self, rows: np.ndarray) -> Coded:
        """Returns the codes of rows."""
        return planted(self.rows.tokens(rows))

    def fingerprint(self) -> dict[str, Any]:
        """Returns the seed, on which nothing depends."""
        return {"coder": self.seed}


def tokenizer(**options: Any) -> Any:
    """Returns the tokenizer of the words."""
    return tiny_tokenizer(words=WORDS, **options)


def drawn(seed: int, n: int) -> list[str]:
    """Returns so many words drawn at random, the last one less often."""
    draw = random.Random(seed)
    return [WORDS[-1] if draw.random() < 0.0002 else draw.choice(WORDS[:-1]) for _ in range(n)]


def write_documents(path: Path, lengths: list[int], seed: int = 0) -> Path:
    """Writes documents of so many words as lines of JSON, and returns the file."""
    texts = [" ".join(drawn(1000 * seed + number, n)) for number, n in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_corpus(source: Path, tokens: int = 10**9, context_length: int = CONTEXT_LENGTH, **options: Any) -> Corpus:
    """Returns a file of words as rows."""
    text = TextConfig(source=str(source), context_length=context_length, **options)
    return corpus_of_text(text, tokenizer(), {"model": "planted"}, tokens)


def of_rows(folder: Path, rows: list[list[int]], splits: list[int], context_length: int = CONTEXT_LENGTH) -> Corpus:
    """Returns a corpus of rows made by hand, each a section of its own; their first token is taken for BOS."""
    made_from = {"rows": "by hand"}
    writer = ShardWriter(folder / TOKENS, TOKENS, made_from)
    tokens = np.full((len(rows), context_length), -1, np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    half = len(rows) // 2  # two shards, so that reading joins them
    for number, part in enumerate((tokens[:half], tokens[half:])):
        writer.write(number, {"tokens": torch.from_numpy(part.copy())})
    writer.finish({"context_length": context_length, "first": 1, "sections": len(rows), "split_by": "document"})
    index = {
        "document": np.arange(len(rows), dtype=np.int32),
        "section": np.arange(len(rows), dtype=np.int32),
        "split": np.array(splits, np.int8),
        "length": np.array([len(row) for row in rows], np.int32),
        "name": np.arange(len(rows), dtype=np.int64) * 7919,
    }
    writer = ShardWriter(folder / INDEX, INDEX, made_from)
    writer.write(0, {name: torch.from_numpy(array) for name, array in index.items()})
    writer.finish({})
    return Corpus(folder, made_from)


class Found:
    """All that both passes and the maker of examples say of a planted text."""

    def __init__(
        self, folder: Path, rows: Corpus, latents: Any = None, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.rows, first, self.codes = rows, PlantedCodes(rows, "evidence"), PlantedCodes(rows, "windows")
        self.evidence: Evidence = gather_evidence(first, rows, folder / "evidence", Keep(SIZES), Watch(should_stop))
        self.latents = np.arange(D_SAE) if latents is None else np.array(latents)
        near = [[(int(latent) + 40) % D_SAE, (int(latent) + 1) % D_SAE] for latent in self.latents]
        self.plan: Plan = plan_places(self.evidence, rows, self.latents, near, 0)
        self.visits: Visits = visit_places(self.codes, rows, self.plan, folder / "evidence", Watch(should_stop))
        self.maker = ExampleMaker(self.evidence, self.visits, rows, Decoder(tokenizer()), ExampleConfig(), 0)


def states_equal(a: Evidence, b: Evidence) -> None:
    """Raises unless two passes found the same bits."""
    assert a.state.keys() == b.state.keys()
    for name, array in a.state.items():
        assert array.dtype == b.state[name].dtype, name
        assert np.array_equal(array, b.state[name]), name


def passes(source: Path, folder: Path, first: Any = None, latents: tuple[int, ...] = (3, 9, 41)) -> int:
    """The work of a child: both passes over a text, one rank of however many; `first` may break something beforehand.

    Blocks are small, and what is done is saved after every one of them.
    """
    import interp.evidence.codes
    import interp.evidence.first_pass
    import interp.evidence.second_pass
    from sae.base.errors import Stopped
    from sae.parallel.ranks import process_group

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, process_group():
        patch.setattr(interp.evidence.codes, "BLOCK_TOKENS", 512)
        patch.setattr(interp.evidence.first_pass, "SAVE_EVERY_S", 0.0)
        patch.setattr(interp.evidence.first_pass, "SAVING_SHARE", 1e9)
        patch.setattr(interp.evidence.second_pass, "SHARD_BLOCKS", 2)
        stopped = first(patch) if first else None
        try:
            Found(folder, read_corpus(source), latents, should_stop=stopped or (lambda: False))
        except Stopped:
            return Stopped.exit_code
    return 0


def result(folder: Path) -> dict[str, bytes]:
    """Returns the files that two equal runs of both passes have in common."""
    found = [*folder.glob("evidence/latents/shard-*"), *folder.glob("evidence/windows/*/shard-*")]
    assert len(found) > 3, "not all is there"
    assert not list(folder.rglob("pass-*"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.suffix == ".safetensors"}

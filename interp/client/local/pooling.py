"""One vector for a text from an encoder's token vectors, pooled as its sentence-transformers files say.

Without such files, or with all-MiniLM-L6-v2's: the mean over the text's tokens. All vectors are scaled to length 1.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.client.answers import in_single_precision
from interp.client.requests import Reply
from sae.base.errors import ConfigError
from sae.base.network import hub_or_cache

MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def prepared(tokenizer: Any, source: Path | str, texts: Sequence[str], context: int) -> tuple[str, list[list[int]]]:
    """Returns (how to pool, token ids of every text, cut to what the encoder was made for)."""
    mode = pooling_mode(source)
    longest = min(context, _told(source, "sentence_bert_config.json").get("max_seq_length") or context)
    coded = tokenizer(list(texts), truncation=True, max_length=longest, split_special_tokens=True)
    return mode, coded["input_ids"]


def embedded(model: Any, tokenizer: Any, mode: str, ids: list[list[int]], budget: int) -> Reply:
    """Returns the vectors of all texts of a request, in single precision."""
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    vectors: dict[int, tuple[float, ...]] = {}
    while order:
        rows = order[-max(1, budget // max(1, len(ids[order[-1]]))) :]
        del order[-len(rows) :]
        chosen = [ids[number] or [tokenizer.pad_token_id or 0] for number in rows]
        width = max(map(len, chosen))
        padded = torch.tensor([row + [tokenizer.pad_token_id or 0] * (width - len(row)) for row in chosen])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
        with torch.inference_mode():
            out = model.base_model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
        pooled = _pooled(out.last_hidden_state.float().cpu(), mask, mode)
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        vectors |= {number: in_single_precision(row) for number, row in zip(rows, unit.tolist(), strict=True)}
    return Reply(vectors=tuple(vectors[number] for number in range(len(ids))), tokens_in=sum(map(len, ids)))


@lru_cache
def pooling_mode(source: Path | str) -> str:
    """Returns mean, first or last; ConfigError for a way of pooling that is not known here."""
    told = _told(source, "1_Pooling/config.json")
    chosen = [name for name, on in told.items() if name.startswith("pooling_mode") and on is True]
    unknown = [name for name in chosen if name not in MODES]
    if unknown or len(chosen) > 1:
        raise ConfigError(f"encoder.model: {source} pools by {', '.join(chosen)}; known here: {', '.join(MODES)}")
    return MODES[chosen[0]] if chosen else "mean"


def _pooled(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Returns [rows, width] from token vectors [rows, tokens, width]; padding is on the right."""
    if mode == "mean":
        weights = mask.unsqueeze(-1).to(hidden)
        return (hidden * weights).sum(1) / weights.sum(1)
    place = mask.sum(1) - 1 if mode == "last" else torch.zeros(len(mask), dtype=torch.long)
    return hidden[torch.arange(len(mask)), place]


@lru_cache
def _told(source: Path | str, name: str) -> dict[str, Any]:
    """Returns what a JSON file beside the model says; nothing where there is no such file."""
    if isinstance(source, Path):
        path = source / name
        return json.loads(path.read_bytes()) if path.is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_or_cache():
        try:
            return json.loads(Path(hf_hub_download(source, name)).read_bytes())
        except EntryNotFoundError:  # also: not cached while offline
            return {}

"""What comes from elsewhere: files of explanations."""

import json
import re
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError
from sae.base.lines import decoded

LATENT_NAMES = ("latent", "index", "feature", "id")
TEXT_NAMES = ("text", "explanation", "description")
LONGEST_CHARS = 10_000
_NUMBER = re.compile(r"[0-9]{1,12}")


def read_explanations(path: Path, d_sae: int) -> dict[int, tuple[str, ...]]:
    """Returns the explanations of every latent in a file, in its order, each text once.

    Either lines of JSON, {"latent": 3, "text": "..."} (also with the field names of Neuronpedia's exports, "index" and
    "description"), or one JSON object {"3": "..."}; a latent may have several. ConfigError names the line that is
    neither, or the id that the coder has not.
    """
    try:
        whole = decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"explanations: {path} cannot be read: {error}") from error
    try:
        members = json.loads(whole, object_pairs_hook=list)  # a list of pairs, in which a key may come twice
    except (ValueError, RecursionError):
        members = None
    one = isinstance(members, list) and all(isinstance(m, tuple) and m[0] not in LATENT_NAMES for m in members)
    if members and one:
        pairs = [(key, text, path.name) for key, text in members]
    else:
        lines = enumerate(whole.split("\n"), 1)  # at line feeds alone, as JSON lines end
        pairs = [_line(line, f"{path.name}:{number}") for number, line in lines if line.strip()]
    if not pairs:
        raise ConfigError(f"explanations: {path} holds none")
    found: dict[int, dict[str, None]] = {}
    several = ((key, told if isinstance(told, list) and told else [told], where) for key, told, where in pairs)
    for key, text, where in ((key, text, where) for key, texts, where in several for text in texts):
        latent = int(key) if _NUMBER.fullmatch(str(key)) else -1
        if not 0 <= latent < d_sae:
            raise ConfigError(f"explanations: {where}: {key!r} is no latent; the coder has 0 to {d_sae - 1}")
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_CHARS:
            raise ConfigError(
                f"explanations: {where}: latent {latent} has no text of at most {LONGEST_CHARS:,} characters"
            )
        found.setdefault(latent, {})[text.strip()] = None
    return {latent: tuple(texts) for latent, texts in found.items()}


def variant(name: str, place: int) -> str:
    """Returns what a latent's explanations of one file are called, as if each were of an explainer of its own.

    The first has the file's name, the next that name and its number: "mine", "mine#2".
    """
    return name if place == 0 else f"{name}#{place + 1}"


def _line(line: str, where: str) -> tuple[Any, Any, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"explanations: {where}: not a line of JSON ({error})") from error
    fields = row if isinstance(row, dict) else {}
    latent = next((fields[name] for name in LATENT_NAMES if name in fields), None)
    text = next((fields[name] for name in TEXT_NAMES if name in fields), None)
    if latent is None or text is None:
        raise ConfigError(f"explanations: {where}: expected an object with latent and text")
    return latent, text, where

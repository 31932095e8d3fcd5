"""Edits of latents, and the one grammar in which they are typed: in a shell, on a page, in a request.

    508=4                   latent 508 is clamped to 4
    508=2x                  ... to twice its largest activation
    17:add=1.5              1.5 is added to what it is      17:scale=0.5   it is halved      17:ablate   it is 0
    508=4 in answer         from the prompt's last token on alone; in prompt: before it
    508=4 if 12>1           where latent 12 is above 1 at the same token, as the model has it without edits
    508=4, 17:ablate        several at once

In JSON an edit is an object of the same names: {"latent": 508, "strength": 2, "unit": "largest", "if": "12>1"}.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from sae.base.arguments import plain
from sae.base.errors import ConfigError
from sae.base.settings import choose, shown

HOWS = ("clamp", "add", "scale", "ablate")
UNITS = ("value", "largest")
PLACES = ("prompt", "answer", "both")
FIELDS = ("latent", "how", "strength", "unit", "where", "when")
EXAMPLES = "508=4, 17:add=2x, 9:ablate, 3:scale=0.5 if 12>1"

LARGEST = 3.4e38  # what float32 holds

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*(\d{{1,18}})\s*([<>])\s*({_NUMBER})\s*")
_EDIT = re.compile(
    r"\s*(\d{1,18})\s*(?::\s*(\w+)\s*)?(?:=\s*([^\s,;]+)\s*)?(?:\bin\s+(\w+)\s*)?(?:\bif\s+([^,;]*?)\s*)?"
)
_STRENGTH = re.compile(rf"({_NUMBER})(x?)")


@dataclass(frozen=True)
class Condition:
    """Whether another latent is above or below a value at the same token."""

    latent: int
    than: str
    """">" or "<"."""
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", _whole("edits.if", self.latent))
        choose("edits.if", self.than, (">", "<"))
        object.__setattr__(self, "threshold", _finite("edits.if", self.threshold))

    def __str__(self) -> str:
        return f"{self.latent}{self.than}{self.threshold:g}"


@dataclass(frozen=True)
class Edit:
    """What is done to one latent. ConfigError names the field whose value is not allowed."""

    latent: int
    how: str = "clamp"
    """clamp (it is `strength`), add (`strength` is added to it), scale (it is multiplied by it), ablate (it is 0)."""
    strength: float | None = None
    """None where it is to be found, of a target KL; ablate has none."""
    unit: str = "value"
    """Of the strength of clamp and add: value, or largest (times the latent's largest activation)."""
    where: str = "both"
    """answer (from the prompt's last token on, where the answer is predicted), prompt (before that), both."""
    when: Condition | None = None
    """Where alone it acts; a text such as "12>1" is taken, too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", _whole("edits.latent", self.latent))
        for name, allowed in (("how", HOWS), ("unit", UNITS), ("where", PLACES)):
            choose(f"edits.{name}", getattr(self, name), allowed)
        if self.when is not None:
            object.__setattr__(self, "when", _condition(self.when))
        if self.strength is not None:
            object.__setattr__(self, "strength", _finite("edits.strength", self.strength))
        if self.how == "ablate" and self.strength is not None:
            raise ConfigError(f"edits.strength: {self.strength:g}, but ablate makes a latent 0; leave it out, or clamp")
        if self.unit == "largest" and self.how in ("scale", "ablate"):
            said = "unit: 'largest'" if self.strength is None else f"strength: '{self.strength:g}x'"
            raise ConfigError(f"edits.{said} is of clamp and add; {self.how} takes no largest activation")

    def __str__(self) -> str:
        how = "" if self.how == "clamp" else f":{self.how}"
        strength = "" if self.strength is None else f"={self.strength:g}{'x' * (self.unit == 'largest')}"
        where = "" if self.where == "both" else f" in {self.where}"
        return f"{self.latent}{how}{strength}{where}{f' if {self.when}' if self.when else ''}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as `as_edits` takes it."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {**found, "when": str(self.when) if self.when else None}


EditsLike: TypeAlias = "str | Edit | Mapping[str, Any] | Sequence[str | Edit | Mapping[str, Any]]"


def as_edits(value: EditsLike) -> tuple[Edit, ...]:
    """Returns edits however they are said: typed, as objects of JSON, ours, or several of these in a list.

    ConfigError names what is wrong, and refuses a latent that is edited twice under the same condition.
    """
    edits = tuple(_each(value))
    for one, other in combinations(edits, 2):
        if _meet(one, other):
            raise ConfigError(f"edits: latent {one.latent} is edited twice at the same tokens: {one} and {other}")
    return edits


def parse_edits(text: str) -> tuple[Edit, ...]:
    """Returns the edits that a text spells; none of an empty one. Errors are those of `as_edits`."""
    return as_edits(text)


def check_latents(edits: Iterable[Edit], d_sae: int) -> None:
    """Raises ConfigError for a latent that a coder has not."""
    for edit in edits:
        for latent in (edit.latent, *([edit.when.latent] if edit.when else [])):
            if latent >= d_sae:
                raise ConfigError(f"latent: {latent} is not one of this coder's; allowed are 0 to {d_sae - 1}")


def _each(value: Any) -> Iterable[Edit]:
    if isinstance(value, Edit):
        yield value
    elif isinstance(value, str):
        yield from (_typed(part) for part in re.split(r"[,;\n]", value) if part.strip())
    elif isinstance(value, Mapping):
        yield _of_json(value)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _each(part)
    else:
        raise ConfigError(f"edits: {shown(value)} is none; say them as in {EXAMPLES!r}, or as objects with latent, how")


def _meet(one: Edit, other: Edit) -> bool:
    """Whether two edits are of one latent, and by what is said act at the same tokens."""
    return (one.latent, one.when) == (other.latent, other.when) and (
        one.where == other.where or "both" in (one.where, other.where)
    )


def _typed(text: str) -> Edit:
    match = _EDIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"edits: {shown(text.strip())} is not LATENT[:HOW][=STRENGTH] [in WHERE] [if LATENT>VALUE]")
    latent, how, strength, where, when = match.groups()
    value, unit = _strength(strength) if strength else (None, "value")
    return Edit(int(latent), how or "clamp", value, unit, where or "both", when or None)  # type: ignore[arg-type]


def _of_json(data: Mapping[str, Any]) -> Edit:
    said = {"when" if name == "if" else name: value for name, value in data.items()}
    for name in said:
        choose("edits", name, FIELDS)
    if said.get("latent") is None:
        raise ConfigError(f"edits: {shown(dict(data))} has no latent")
    if isinstance(said.get("strength"), str):
        said["strength"], unit = _strength(said["strength"])
        said.setdefault("unit", unit)
    said["when"] = said.get("when") or None
    return Edit(**{name: value for name, value in said.items() if value is not None})


def _strength(text: str) -> tuple[float, str]:
    match = _STRENGTH.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"edits.strength: {shown(text)} is neither a number nor one of largest activations, as in 2x")
    return float(match[1]), UNITS[bool(match[2])]


def _condition(value: Any) -> Condition:
    if isinstance(value, Condition):
        return value
    match = _CONDITION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"edits.if: {shown(value)} is not LATENT>VALUE or LATENT<VALUE, as in 12>1")
    return Condition(int(match[1]), match[2], float(match[3]))


def _whole(name: str, value: Any) -> int:
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ConfigError(f"{name}: {shown(value)} is not the id of a latent, which is a whole number from 0")
    return given


def _finite(name: str, value: Any) -> float:
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= LARGEST:
        raise ConfigError(f"{name}: {shown(value)} is not a number up to {LARGEST:g}")
    return float(given)

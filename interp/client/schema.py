"""Reading an answer that must be JSON of a given schema: strictly, or not at all.

There must be exactly one candidate: the whole text, the content of one fence, or one value of the schema's type within
prose. Nothing is guessed: two candidates, repeated keys, numbers in quotes or a missing field are no answer, and the
problem is told in words that a model can mend it by. No library checks it: by the standard 3.0 is an integer, half a
character is text and a word that is not known means nothing, and what a library says of a problem would be worded anew.
"""

import json
import math
import re
from typing import Any

from interp.client.shapes import number, told

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OPENING = re.compile(r"[{\[]\s*([\"{\[\d-]?)")
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_KEYWORDS = {
    *("type", "properties", "required", "additionalProperties", "items", "enum", "title", "description"),
    *("minItems", "maxItems", "minimum", "maximum", "minLength", "maxLength"),
}
_MISSING = object()


def parse(text: str, schema: dict[str, Any]) -> tuple[Any, str]:
    """Returns (value, "") where the text holds one answer that follows the schema, else (None, what is wrong)."""
    value, problem = _only(text, schema)
    problem = told(problem or check(value, schema))
    return (None, problem) if problem else (value, "")


def check(value: Any, schema: dict[str, Any], where: str = "the answer") -> str:
    """Returns what is wrong with a value, or ""; ValueError for a schema with words that are not understood."""
    unknown = set(schema) - _KEYWORDS
    if unknown:
        raise ValueError(
            f"schema: {', '.join(sorted(unknown))} not understood; allowed: {', '.join(sorted(_KEYWORDS))}"
        )
    kind = schema.get("type")
    if "enum" in schema and not any(value == allowed and type(value) is type(allowed) for allowed in schema["enum"]):
        return f"{where} is {_shown(value)}, not one of {json.dumps(schema['enum'])}"
    if kind is None:
        return ""
    if not _is(value, kind):
        return f"{where} is {_shown(value)}, not of type {kind}"
    if kind == "object":
        return _check_object(value, schema, where)
    if kind == "array":
        return _check_size(len(value), schema, "Items", where) or next(
            (
                problem
                for number, item in enumerate(value)
                if (problem := check(item, schema.get("items", {}), f"{where}[{number}]"))
            ),
            "",
        )
    if kind == "string":
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{where} holds half a character"
        return _check_size(len(value), schema, "Length", where)
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if number(value) is None or not low <= value <= high:
            return f"{where} is {_shown(value)}, not between {low} and {high}"
    return ""


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _check_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> str:
    known = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{where} lacks {', '.join(missing)}"
    extra = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name not in known and extra is False:
            return f"{where} has {_shown(name)}, which is not asked for"
        rule = known.get(name, extra if isinstance(extra, dict) else {})
        problem = check(item, rule, f"{where}.{name[:40]}")
        if problem:
            return problem
    return ""


def _check_size(size: int, schema: dict[str, Any], what: str, where: str) -> str:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", math.inf)
    return "" if low <= size <= high else f"{where} has {what.lower()} {size}, not between {low} and {high}"


def _only(text: str, schema: dict[str, Any]) -> tuple[Any, str]:
    """Returns (the only candidate, ""), or (None, why there is not just one)."""
    whole = _load(text)
    if whole is not _MISSING:
        return whole, ""
    fenced = [value for value in map(_load, _FENCE.findall(text)) if value is not _MISSING]
    found = fenced or _values(text, _TYPES.get(schema.get("type", ""), (dict, list)))
    if len(found) == 1:
        return found[0], ""
    return None, f"{len(found)} JSON values where one is wanted" if found else "it holds no valid JSON"


def _values(text: str, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the outermost objects and arrays within prose that are of a kind that is wanted.

    None where JSON begins and does not end: what stands within it would be a guess.
    """
    found, at = [], 0
    while match := _OPENING.search(text, at):
        try:
            value, at = _DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            if match[1]:
                return []
            at = match.end()  # "[sic]": prose
            continue
        if isinstance(value, kinds):
            found.append(value)
    return found


def _load(text: str) -> Any:
    try:
        value, end = _DECODER.raw_decode(text.strip())
    except (ValueError, RecursionError):
        return _MISSING
    return value if end == len(text.strip()) else _MISSING


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else told(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused)

"""Fields read from the source are those that the classes have once they are imported; nothing is imported for it."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import draccus
import pytest
from draccus.wrappers.docstring import get_attribute_docstring

from interp.run.config import ExplainConfig
from sae.base.fields import fields
from sae.base.plugins import Plugin, names
from sae.base.settings import decode
from sae.training.config import TrainConfig

KINDS = {"sae.training.config:TrainConfig": TrainConfig, "interp.run.config:ExplainConfig": ExplainConfig}


def imported(kind: type[Any], prefix: str = "", of: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """Yields (path, default, docstring, plug-in) by what the imported classes say."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        path, hint, default = prefix + f.name, hints[f.name], f.default
        if default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        owners = [owner for owner in kind.__mro__ if f.name in inspect.get_annotations(owner)]
        docs = [" ".join(get_attribute_docstring(owner, f.name).docstring_below.split()) for owner in owners]
        doc = next(filter(None, docs), "")
        family = get_args(hint)[1] if get_origin(hint) is dict else hint
        family = family if isinstance(family, type) and issubclass(family, Plugin) else None
        if dataclasses.is_dataclass(hint) and family is None:
            yield from imported(hint, f"{path}.", of)
            continue
        if family is hint:
            yield f"{path}.type", hint.get_choice_name(type(default)), f"{doc} One of: {', '.join(names(hint))}.", of
        else:
            yield path, default, doc, of
        for name, choice in names(family).items() if family else ():
            yield from imported(choice, f"{path}." if family is hint else f"{path}.{name}.", name)


@pytest.mark.parametrize("config", KINDS)
def test_they_are_those_of_the_imported_classes(config):
    read = {(one.path, one.of): one for one in fields(config) if one.kind != "group"}
    there = {(path, of): (default, doc) for path, default, doc, of in imported(KINDS[config])}
    assert list(read) == list(there)
    for key, (default, doc) in there.items():
        assert read[key].doc == doc
        told = "reconstruction, auxk" if key[0] == "coder.objectives" else str(draccus.encode(default))
        assert read[key].default == told, key


@pytest.mark.parametrize("config", KINDS)
def test_choices_are_what_is_allowed(config):
    """Each is decoded, and where it is none of a plug-in's an invented one is refused by `validate`."""
    found = {one.path: one.choices for one in fields(config) if one.choices}
    assert found["text.layout"] == ("packed", "one_per_row")
    assert found["text.streaming"] == ("true", "false")
    if KINDS[config] is TrainConfig:
        assert {"topk", "jumprelu"} <= set(found["coder.selection.type"])
        assert "linear" in found["coder.encoder"]
        assert found["coder.pre_bias"] == ("none", "decoder", "own")
        for name in found["coder.selection.type"]:
            decode(TrainConfig, {"coder": {"selection": {"type": name}}})
    else:
        assert "surprisal" in found["scorers"]


def test_groups_stand_before_their_fields_and_say_what_they_are():
    paths = [one.path for one in fields("sae.training.config:TrainConfig")]
    groups = [one for one in fields("sae.training.config:TrainConfig") if one.kind == "group"]
    assert {"model", "text", "coder", "coder.selection", "optim"} <= {one.path for one in groups}
    assert all(one.doc for one in groups)
    for one in groups:
        first = next(path for path in paths if path.startswith(f"{one.path}."))
        assert paths.index(one.path) == paths.index(first) - 1


def test_nothing_is_imported():
    code = """
import sys
from sae.base.fields import fields
found = [len(fields(name)) for name in ("sae.training.config:TrainConfig", "interp.run.config:ExplainConfig")]
print(min(found) > 100, {"torch", "draccus", "sae.training", "interp"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_a_class_that_is_not_there():
    with pytest.raises(LookupError, match=r"sae\.training\.config has no class Trian"):
        fields("sae.training.config:Trian")

"""The table of transformers' training arguments names what is there, on both sides."""

import dataclasses
import inspect
import re

import draccus
from rigs.markdown import ROOT
from transformers import TrainingArguments

import sae
from sae.base.settings import flat

ROW = re.compile(r"^\| (`.*?) \| (.*) \|$", re.MULTILINE)


def test_both_sides_of_the_table_are_there():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = ROW.findall(page.split("| TrainingArguments | here |")[1].split("\n\n")[0])
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {*flat(draccus.encode(sae.TrainConfig())), *vars(sae.TrainConfig())}
    assert len(rows) == 16
    for left, right in rows:
        assert set(re.findall(r"`(\w+)`", left)) <= theirs
        names = re.findall(r"`([\w.]+)`", right)
        calls = re.findall(r"`sae\.train\(config, (\w+)=", right)
        assert names or calls
        assert set(names) <= ours
        assert set(calls) <= inspect.signature(sae.train).parameters.keys()

"""The table of transformers' training arguments names what is there, on both sides."""

import dataclasses
import inspect
import re

import draccus
import pytest
from rigs.markdown import ROOT
from transformers import TrainingArguments

import sae
from sae.base.errors import ConfigError
from sae.base.settings import flat

ROW = re.compile(r"^\| (`.*?) \| (.*) \|$", re.MULTILINE)


def test_both_sides_of_the_table_are_there():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = ROW.findall(page.split("| TrainingArguments | here |")[1].split("\n\n")[0])
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {*flat(draccus.encode(sae.TrainConfig())), *vars(sae.TrainConfig())}
    assert len(rows) == 16
    told = {name: re.findall(r"`([\w.]+)`", right) for left, right in rows for name in re.findall(r"`(\w+)`", left)}
    hints = sae.TrainConfig.ALSO_CALLED
    assert hints.keys() - {"warmup_ratio"} == told.keys() - {"seed", "resume_from_checkpoint", "disable_tqdm"}
    assert all(hints[name] in told[name] for name in hints if name != "warmup_ratio")  # which it was called before
    for left, right in rows:
        assert set(re.findall(r"`(\w+)`", left)) <= theirs
        names = re.findall(r"`([\w.]+)`", right)
        calls = re.findall(r"`sae\.train\(config, (\w+)=", right)
        assert names or calls
        assert set(names) <= ours
        assert set(calls) <= inspect.signature(sae.train).parameters.keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: no such field. Did you mean 'optim.lr'?"),
        ({"lr": 1e-4}, "lr: no such field. Did you mean 'optim.lr'?"),
        ({"k": 32}, "k: no such field. Did you mean 'coder.selection.k'?"),
        ({"coder": {"k": 32}}, "coder.k: no such field. Did you mean 'coder.selection.k'?"),
        ({"tokns": 1}, "tokns: no such field. Did you mean 'tokens'?"),
    ],
)
def test_a_name_of_others_or_from_further_down_is_refused_with_ours(typed, meant):
    with pytest.raises(ConfigError, match=re.escape(meant)):
        sae.train(typed)

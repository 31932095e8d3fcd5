"""No knob that does nothing: every field of every rule and loss term, changed alone, changes what training comes to."""

from dataclasses import MISSING, fields, replace

import pytest
import torch
from rigs.fakes import measured

from sae.base import plugins
from sae.objectives import Objective, Spliced
from sae.selection import trainable
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D, M, N, STEPS = 8, 24, 48, 10
RULES = {name: kind for name, kind in trainable().items() if name == kind.get_choice_name(kind)}  # no second names
TERMS = plugins.names(Objective)
# what to change a field to where its type does not say; all others are moved by `changed`
CHANGED = {
    ("gradient_topk", "loss"): None,  # what the language model is asked for, before any coder: tests/cli/test_fields.py
    ("gradient_topk", "gradient_norm"): "token",
    ("gradient_topk", "inference"): "gradient",
    ("feature_choice", "density"): "own",
    ("feature_choice", "exponent"): 2.0,
    ("feature_choice", "shift"): 1.0,
    ("feature_choice", "mutual_share"): 0.5,
    ("groupmax", "k"): 6,
    ("matryoshka", "prefixes"): (0.5, 1.0),
    ("aux_zipf", "tau"): 1.5,
    ("auxk", "k"): 1,
    "warmup_share": 0.5,
}
# what else must be set for a field to mean anything
SETTING = {
    "anneal_share": {"k_start": 12},
    "adapt_rate": {"target_l0": 2.0},
    ("aux_zipf", "k"): {"tau": 2.0},
}
# defaults meant for wider coders
SMALL = {"l0": {"target_l0": 3.0}}
RULE_OF = {"l0": "jumprelu", "gate": "gated"}


def small(name):
    kind = RULES[name]
    return kind(k=3) if "k" in kind.__dataclass_fields__ else kind()


def changed(owner, field):
    """Another value for a field of a plug-in: a little larger, or as said in CHANGED."""
    name = owner.get_choice_name(type(owner))
    for key in ((name, field.name), field.name):
        if key in CHANGED:
            return CHANGED[key]
    value = getattr(owner, field.name)
    assert type(value) in (int, float), f"say in CHANGED what {name}.{field.name} takes"
    if isinstance(value, int):
        return value + 2 if value else 5
    return 0.7 * value + 0.013 if value else 0.5


def outcome(rule, terms):
    """Weights and codes after a few steps on always the same activations; no metrics, which merely name a weight."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * N, D, generator=draw) * torch.rand(STEPS * N, 1, generator=draw).add(0.1) + 0.3
    gradients = torch.randn(STEPS * N, D, generator=draw)
    readout = torch.randn(D, 7, generator=draw)
    config = CoderConfig(d_sae=M, selection=rule, objectives=terms)
    config.validate(D)
    # some latents are dead from the third step on, so that what revives them takes part
    trainer = CoderTrainer(new_coder(config, measured(x)), terms, OptimConfig(lr=1e-2), Schedule(STEPS, N))
    trainer.coder.b_enc.data[:8] = -2.0
    for step, (part, g) in enumerate(zip(x.split(N), gradients.split(N), strict=True)):

        def spliced(number, made, part=part):
            return Spliced(part @ readout, made @ readout, torch.arange(len(part)) % 7)

        trainer.step(Batch(part, part, g, None, spliced), step)
    made = trainer.trained()
    codes = made.encode(x, gradients if made.spec.selection.looks_at_gradients else None)
    return {name: p.tolist() for name, p in made.state_dict().items()}, codes.to_dense().tolist()


def terms_of(rule, **more):
    names = ("reconstruction", "auxk", *(group[0] for group in rule.needs))
    return {name: replace(TERMS[name](), **SMALL.get(name, {})) for name in names} | more


RULE_FIELDS = [(name, field) for name, kind in RULES.items() for field in fields(kind)]
TERM_FIELDS = [(name, field) for name, kind in TERMS.items() for field in fields(kind)]


@pytest.mark.parametrize(("name", "field"), RULE_FIELDS, ids=lambda v: getattr(v, "name", v))
def test_a_changed_field_of_a_rule_changes_the_outcome(name, field):
    rule = small(name)
    rule = replace(rule, **SETTING.get((name, field.name), SETTING.get(field.name, {})))
    value = changed(rule, field)
    if value is None:
        return
    assert outcome(rule, terms_of(rule)) != outcome(replace(rule, **{field.name: value}), terms_of(rule))


@pytest.mark.parametrize(("name", "field"), TERM_FIELDS, ids=lambda v: getattr(v, "name", v))
def test_a_changed_field_of_a_term_changes_the_outcome(name, field):
    rule = small(RULE_OF.get(name, "topk"))
    term = replace(TERMS[name](), **SMALL.get(name, {}), **SETTING.get((name, field.name), SETTING.get(field.name, {})))
    other = replace(term, **{field.name: changed(term, field)})
    assert outcome(rule, terms_of(rule, **{name: term})) != outcome(rule, terms_of(rule, **{name: other}))


def test_the_same_config_gives_the_same_outcome():
    rule = TopK(3)
    assert outcome(rule, terms_of(rule)) == outcome(rule, terms_of(rule))
    assert all(field.default is not MISSING or field.default_factory is not MISSING for _, field in RULE_FIELDS)

"""A loaded model stands wherever a name does: taken out of what is around it, or refused in one line."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

import sae
from sae.base.errors import ConfigError
from sae.lm.models import LanguageModel, ModelConfig, as_language_model


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


class Peft(torch.nn.Module):
    """What peft puts around a model, which is not installed here: adapters lie inside of it."""

    def __init__(self, base, learned=False):
        super().__init__()
        self.base_model = base
        self.active_peft_config = SimpleNamespace(
            is_prompt_learning=learned, peft_type=SimpleNamespace(value="PREFIX_TUNING")
        )

    def get_base_model(self):
        return self.base_model


def test_a_model_is_what_its_name_leads_to(model, tiny_model):
    given, named = sae.load_language_model(model), sae.load_language_model(tiny_model)
    assert given.model is model
    assert (given.given, named.given) == (True, False)
    assert given.fingerprint() == named.fingerprint()
    assert (given.is_causal, given.positions) == (named.is_causal, named.positions)


@pytest.mark.parametrize(
    "around",
    [
        lambda model, tokenizer: pipeline("text-generation", model=model, tokenizer=tokenizer),
        lambda model, _: torch.compile(model),
        lambda model, _: torch.nn.DataParallel(model),
        lambda model, _: Peft(model),
        lambda model, _: torch.compile(torch.nn.DataParallel(Peft(model))),
        lambda model, tokenizer: LanguageModel(model, tokenizer, "here", None, True),
    ],
    ids=["pipeline", "compiled", "parallel", "peft", "all of them", "ours"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, as it compiles
def test_it_is_found_inside_of_what_is_around_it(model, tokenizer, around):
    assert as_language_model(around(model, tokenizer)).model is model


def test_it_is_put_into_evaluation_mode_and_takes_no_gradients(model, caplog):
    model.train()
    with caplog.at_level("INFO", "sae"):
        as_language_model(model)
    assert not model.training
    assert not any(weights.requires_grad for weights in model.parameters())
    assert "is in evaluation mode from here on" in caplog.text


def test_a_model_without_a_head_predicts_nothing(tiny_model):
    assert not as_language_model(AutoModel.from_pretrained(tiny_model)).is_causal


def test_a_dict_and_a_config_are_of_a_model_by_name(tiny_model):
    said = {"name": str(tiny_model), "dtype": "bfloat16"}
    for given in (said, ModelConfig(**said)):
        assert as_language_model(given).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"^model\.nam: no such field\. Did you mean 'name'\?"):
        as_language_model({"nam": "x"})


def test_a_model_made_here_needs_a_tokenizer(model, tokenizer, tiny_model):
    made = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "_name_or_path": ""}))
    with pytest.raises(ConfigError, match=r"^tokenizer: the LlamaForCausalLM .* no name .*; pass it$"):
        as_language_model(made)
    for given in (tokenizer, tiny_model, str(tiny_model), SimpleNamespace(tokenizer=tokenizer)):
        lm = as_language_model(made, given)
        assert lm.name == "object:LlamaForCausalLM"
        assert lm.tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ConfigError, match=r"^model\.name: this was a loaded LlamaForCausalLM .* pass it again"):
        sae.load_language_model(lm.name)
    with pytest.raises(TypeError, match=r"^tokenizer: 3 was given; it takes a name, a folder, or a tokenizer"):
        as_language_model(made, 3)
    with pytest.raises(ConfigError, match=r"^tokenizer: .*absent"):
        as_language_model(made, "/absent")


def test_a_tokenizer_of_another_model_is_refused(model):
    with pytest.raises(ConfigError, match="do not belong together"):
        as_language_model(model, "quickstart")


def test_what_is_said_of_a_name_is_refused_beside_a_model(model):
    for said in ({"revision": "main"}, {"dtype": "float16"}, {"device": "cpu"}):
        (field,) = said
        with pytest.raises(ConfigError, match=rf"^{field}: .* the one given is loaded already$"):
            sae.load_language_model(model, **said)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "None"),
        (7, "7"),
        (torch.zeros(2, 3), "torch.Tensor of shape [2, 3]"),
        (AutoModelForCausalLM, "the class AutoModelForCausalLM, not an object of it,"),
        (LlamaConfig(), "transformers.LlamaConfig"),
        (torch.nn.Linear(2, 2), "torch.Linear"),
        (["a"], "list"),
    ],
)
def test_what_is_no_model_is_one_line(given, told):
    with pytest.raises(
        TypeError, match=rf"^model: {re.escape(told)} was given; it takes a name, a folder, or a loaded"
    ):
        sae.load_language_model(given)


def test_a_learned_prompt_and_transformerlens_are_refused_with_what_to_pass(model):
    with pytest.raises(TypeError, match=r"^model: .*Peft puts a learned prompt \(PREFIX_TUNING\) before the text"):
        as_language_model(Peft(model, learned=True))
    hooked = type("HookedTransformer", (torch.nn.Module,), {"__module__": "transformer_lens.HookedTransformer"})()
    hooked.cfg = SimpleNamespace(tokenizer_name="gpt2")
    with pytest.raises(TypeError, match=r"transformer_lens\.HookedTransformer .* pass the name, here 'gpt2', or the"):
        as_language_model(hooked)
